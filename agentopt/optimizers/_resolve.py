"""From what a user wrote (`"auto"`, `"a+b"`, an object) to an optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from agentopt.errors import UserError
from agentopt.optimizers._protocol import Optimizer


def _auto(template: Path | None) -> Optimizer:
    from agentopt.optimizers._auto import Auto

    return Auto(template=template)


def _capsule(template: Path | None) -> Optimizer:
    from agentopt.optimizers._capsules import Capsules

    return Capsules()


def _code(template: Path | None) -> Optimizer:
    from agentopt.optimizers._code import CodeRepair

    return CodeRepair(template=template)


def _optoprime(template: Path | None) -> Optimizer:
    from agentopt.optimizers._optoprime import OptoPrime

    return OptoPrime(template=template)


def _demonstrations(template: Path | None) -> Optimizer:
    from agentopt.optimizers._demonstrations import Demonstrations

    return Demonstrations()


def _instructions(template: Path | None) -> Optimizer:
    from agentopt.optimizers._instructions import Instructions

    return Instructions(template=template)


def _instructions_free(template: Path | None) -> Optimizer:
    from agentopt.optimizers._instructions import Instructions

    return Instructions(lm=False, template=template)


def _knowledge(template: Path | None) -> Optimizer:
    from agentopt.optimizers._knowledge import KnowledgeForms

    return KnowledgeForms()


def _playbook(template: Path | None) -> Optimizer:
    from agentopt.optimizers._playbook import Playbook

    return Playbook(template=template)


def _tpe(template: Path | None) -> Optimizer:
    from agentopt.optimizers._tpe import Tpe

    return Tpe()


def _values(template: Path | None) -> Optimizer:
    from agentopt.optimizers._values import Values

    return Values()


def _bootstrap(template: Path | None) -> Optimizer:
    from agentopt.optimizers._bootstrap import Bootstrap

    return Bootstrap()


def _grounded(template: Path | None) -> Optimizer:
    from agentopt.optimizers._grounded import Grounded

    return Grounded(template=template)


def _opro(template: Path | None) -> Optimizer:
    from agentopt.optimizers._opro import Opro

    return Opro(template=template)


def _optoprime_multi(template: Path | None) -> Optimizer:
    from agentopt.optimizers._optoprime_multi import OptoPrimeMulti

    return OptoPrimeMulti(template=template)


def _reflection(template: Path | None) -> Optimizer:
    from agentopt.optimizers._reflection import Reflection

    return Reflection(template=template)


def _textgrad(template: Path | None) -> Optimizer:
    from agentopt.optimizers._textgrad import TextGrad

    return TextGrad(template=template)


def _symbolic(template: Path | None) -> Optimizer:
    from agentopt.optimizers.symbolic import Symbolic

    return Symbolic(template=template)


def _symbolic_prompt(template: Path | None) -> Optimizer:
    from agentopt.optimizers.symbolic import Symbolic, SymbolicOptions

    return Symbolic(SymbolicOptions(kinds=("prompt",)), template=template, name="symbolic-prompt")


def _symbolic_tool(template: Path | None) -> Optimizer:
    from agentopt.optimizers.symbolic import Symbolic, SymbolicOptions

    return Symbolic(SymbolicOptions(kinds=("tool",)), template=template, name="symbolic-tool")


def _symbolic_pipeline(template: Path | None) -> Optimizer:
    from agentopt.optimizers.symbolic import Symbolic, SymbolicOptions

    return Symbolic(SymbolicOptions(kinds=("pipeline",)), template=template, name="symbolic-pipeline")


_BY_NAME: dict[str, Callable[[Path | None], Optimizer]] = {
    "auto": _auto,
    "bootstrap": _bootstrap,
    "capsule": _capsule,
    "code": _code,
    "demonstrations": _demonstrations,
    "grounded": _grounded,
    "instructions": _instructions,
    "instructions-free": _instructions_free,
    "knowledge": _knowledge,
    "opro": _opro,
    "optoprime": _optoprime,
    "optoprime-multi": _optoprime_multi,
    "reflection": _reflection,
    "textgrad": _textgrad,
    "playbook": _playbook,
    "tpe": _tpe,
    "symbolic": _symbolic,
    "symbolic-pipeline": _symbolic_pipeline,
    "symbolic-prompt": _symbolic_prompt,
    "symbolic-tool": _symbolic_tool,
    "values": _values,
}

OPTIMIZER_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def resolve_optimizer(spec: str | object, *, template: str | Path | None = None) -> Optimizer:
    """Turn `spec` into an optimizer.

    Args:
        spec: a name of `OPTIMIZER_NAMES`, several joined with `+` (they take turns), or any object
            with `propose(context)`.
        template: a meta-prompt file that overrides fragments of the shipped ones; checked here, before anything runs.

    Raises:
        UserError: an unknown name, an object without `propose`, or a template file that cannot be used.
    """
    path = None if template is None else Path(template)
    if path is not None:
        from agentopt.optimizers._templates import load_templates

        load_templates(path)
    if isinstance(spec, str):
        names = [part.strip() for part in spec.split("+")]
        for name in names:
            if name not in _BY_NAME:
                raise UserError(
                    f"Unknown optimizer {name!r}: expected one of {', '.join(_BY_NAME)}, several joined with '+', or "
                    "an object with propose(context)."
                )
        parts = [_BY_NAME[name](path) for name in names]
        if len(parts) == 1:
            return parts[0]
        from agentopt.optimizers._auto import Together

        return Together(parts)
    if isinstance(spec, type):
        raise UserError(f"optimizer={spec.__name__} is a class: pass an instance, {spec.__name__}().")
    if not callable(getattr(spec, "propose", None)):
        raise UserError(
            f"optimizer={spec!r} has no propose(context) method: pass a name ({', '.join(_BY_NAME)}) or an object that "
            "has one."
        )
    if not hasattr(spec, "name"):
        from agentopt.optimizers._auto import Named

        return Named(cast("Optimizer", spec), type(spec).__name__)
    return cast("Optimizer", spec)
