"""A structured prompt: task, principles, demonstrations, output format and extra, each a parameter of its own.

An optimizer can then change one component and leave the others alone (the prompt model of agent symbolic learning,
arXiv 2406.18532). `Components` puts the active parts together into one text; it is no parameter itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from agentopt.errors import UserError
from agentopt.graph import _templates
from agentopt.graph._context import active_value
from agentopt.graph._handles import Demos, Handle, Prompt, _declared
from agentopt.graph._jsonvalue import JSONValue, normalize
from agentopt.graph._parameters import ParameterSpec
from agentopt.graph._principles import Principles, declare_principles, principle_lines

COMPONENTS = ("task", "principles", "demos", "output_format", "extra")
_HEADINGS = {"principles": "Principles", "demos": "Examples", "output_format": "Output format", "extra": "Notes"}


class Components:
    """The parts of one prompt. `format` and `str` read every part that they show, so each read is recorded.

    The task stands first, without a heading: with every other part empty the text is the task alone.
    """

    __slots__ = ("demos", "extra", "name", "output_format", "principles", "task")

    def __init__(
        self, name: str, task: Prompt, principles: Principles, demos: Demos, output_format: Prompt, extra: Prompt
    ) -> None:
        self.name = name
        self.task = task
        self.principles = principles
        self.demos = demos
        self.output_format = output_format
        self.extra = extra

    @property
    def handles(self) -> dict[str, Handle]:
        """The parameters by component, in the order in which they are shown."""
        return {component: getattr(self, component) for component in COMPONENTS}

    def format(self, /, *, with_demos: bool = False, **values: object) -> str:
        """The whole text with its variables filled.

        Args:
            with_demos: show the demonstrations in the text; without it they are left to `demos=` of the model call.
            values: the variables of the parts. A part without variables is taken as it is, braces included.

        Raises:
            KeyError: a variable has no value.
        """
        return self._text(active_value, with_demos, values)

    def __str__(self) -> str:
        return self._text(active_value, False, None)

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def __repr__(self) -> str:
        return f"<components {self.name!r}>"

    def for_model(self, read: Callable[[ParameterSpec], JSONValue]) -> str:
        """What `str` gives, with the values read through `read`."""
        return self._text(read, False, None)

    def _text(
        self, read: Callable[[ParameterSpec], JSONValue], with_demos: bool, values: Mapping[str, object] | None
    ) -> str:
        shown: list[str] = []
        for component, handle in self.handles.items():
            if component == "demos" and not with_demos:
                continue
            part = self._part(component, handle.spec, read(handle.spec), values)
            if part.strip():
                heading = _HEADINGS.get(component)
                shown.append(part if heading is None else f"{heading}:\n{part}")
        return "\n\n".join(shown)

    def _part(self, component: str, spec: ParameterSpec, value: Any, values: Mapping[str, object] | None) -> str:
        if component == "principles":
            return principle_lines(value)
        if component == "demos":
            return "\n\n".join(f"Input: {item['input']}\nOutput: {item['output']}" for item in value)
        text = cast("str", value)
        if values is None or not spec.variables:
            return text
        spec.formatted = True
        return text.format(**values)


def components(
    *,
    name: str,
    task: str,
    principles: Sequence[str] = (),
    demos: Sequence[Mapping[str, str]] = (),
    output_format: str = "",
    extra: str = "",
    max_demos: int = 8,
    max_principles: int = 24,
) -> Components:
    """Declare a prompt in parts: `NAME.task`, `NAME.principles`, `NAME.demos`, `NAME.output_format`, `NAME.extra`.

    Args:
        name: what the parameters' names begin with.
        task: what is to be done, possibly a `str.format` template; edits keep its variables.
        principles: rules to keep, see `principles`.
        demos: `{"input", "output"}` maps, see `demos`.
        output_format: what the answer must look like.
        extra: anything else.
        max_demos: how many demonstrations there may be at most.
        max_principles: how many principles there may be at most.

    Raises:
        UserError: a part is not what it should be, or a name is declared with another default.
    """
    frame = sys._getframe(1)
    if not isinstance(cast("object", task), str) or not task.strip():
        raise UserError(f"components {name!r}: the task must be a text, found {task!r:.60}.")
    if isinstance(cast("object", max_demos), bool) or not isinstance(cast("object", max_demos), int) or max_demos < 1:
        raise UserError(f"components {name!r}: max_demos must be a whole number of at least 1, found {max_demos!r}.")

    def text(component: str, default: str, description: str) -> Prompt:
        if not isinstance(cast("object", default), str):
            raise UserError(f"components {name!r}: {component} must be a text, found {type(default).__name__}.")
        spec = ParameterSpec(
            f"{name}.{component}",
            "prompt",
            default,
            description=description,
            variables=_templates.variables(default),
            owner=name,
            component=component,
        )
        return _declared(Prompt, spec, frame)

    items = [{"source": "", **item} if isinstance(cast("object", item), Mapping) else item for item in demos]
    shots = ParameterSpec(
        f"{name}.demos",
        "demos",
        normalize(items, f"parameter '{name}.demos'"),
        description="solved examples",
        max_items=max_demos,
        owner=name,
        component="demos",
    )
    return Components(
        name,
        text("task", task, "what is to be done"),
        declare_principles(
            principles,
            f"{name}.principles",
            max_principles,
            "rules to keep while doing the task",
            frame,
            owner=name,
            component="principles",
        ),
        _declared(Demos, shots, frame),
        text("output_format", output_format, "what the answer must look like; may be empty"),
        text("extra", extra, "anything else worth telling; may be empty"),
    )
