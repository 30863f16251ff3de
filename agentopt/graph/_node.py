"""Node: a value that knows where it came from.

A Node keeps the record of the operation that made it alive, and through it everything before; there is no registry.
The operators are in `agentopt.graph._operators`.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from agentopt.errors import UserError
from agentopt.graph import _context
from agentopt.graph._backward import Subgraph, backward
from agentopt.graph._errors import describe, execution_error
from agentopt.graph._handles import Handle
from agentopt.graph._jsonvalue import copied, normalize
from agentopt.graph._live import LiveOp, Op, Rec, current, note_read
from agentopt.graph._parameters import ParameterSpec, declare
from agentopt.graph._records import Feedback
from agentopt.graph._trace import Trace, build_trace
from agentopt.graph._values import ATOMS, CONTAINERS, MUTABLE_CONTAINERS, freeze, kind_of, settle, summarize

if TYPE_CHECKING:
    from agentopt.graph._errors import ExecutionError

VALUE: Final = Op("value", kind="value")
CLONE: Final = Op("clone", ("node",), description="the same value")
MUTATED: Final = Op(
    "mutated", ("before",), description="the container was changed in place outside of any recorded operation"
)
_PACKS: Final = {
    kind: Op(kind.__name__, description=f"a {kind.__name__} made of these")
    for kind in (list, tuple, dict, set, frozenset)
}
_current = current.get


class Node:
    """A value with provenance. Operators on it give Nodes; `value` reads it.

    `==` and `!=` compare values and give a bool, `<`, `>`, `<=`, `>=` give Nodes; hashing is by identity. `str`, `int`,
    `float`, `bool`, `len`, `in`, f-strings and iteration read the value. Other attributes are those of the value,
    traced; where a name is taken by Node itself, use `getattr("name")`.
    """

    __slots__ = ("__weakref__", "_live", "_rec")

    _rec: Rec | LiveOp
    _live: Any

    def __init__(self, value: Any, *, name: str | None = None, description: str | None = None) -> None:
        """Prefer `node(value)`, which leaves a Node as it is and takes lists of Nodes apart."""
        op = (
            VALUE
            if name is None and description is None
            else Op(name or "value", kind="value", description=description)
        )
        self._live = value
        self._rec = _collected(Rec(op, (), settle(value), 0))

    # reading

    @property
    def value(self) -> Any:
        """The plain value. Read inside an op or a recording, the read is recorded."""
        rec, value = self._current()
        note_read(rec, "parameter" if rec.op.kind == "parameter" else "data")
        return value

    @property
    def name(self) -> str:
        """The name given, or one that no other Node of this process has."""
        op = self._rec.op
        return (
            op.name
            if op.kind == "parameter" or (op.kind == "value" and op is not VALUE)
            else f"{op.name}{self._rec.id}"
        )

    @property
    def description(self) -> str | None:
        """What the value is for, or what the operation that made it does."""
        return self._rec.op.description

    @property
    def trainable(self) -> bool:
        """Whether optimizers may change it."""
        return False

    def _current(self) -> tuple[Rec | LiveOp, Any]:
        """The record and the value of this moment; a container changed in place since its record gets a new one."""
        rec, value = self._rec, self._live
        if type(value) in MUTABLE_CONTAINERS and _changed(value, rec.value):
            rec = self._rec = _collected(Rec(MUTATED, (rec,), settle(value), _scope()))
        return rec, value

    def __entry__(self) -> Rec | LiveOp:
        return self._current()[0]

    def __frozen__(self) -> Any:
        return freeze(self._current()[1])

    # provenance

    @property
    def trace(self) -> Trace:
        """Everything this value depends on, as a trace whose output is this Node."""
        rec = self._current()[0]
        return build_trace((), output=rec)

    def backward(self, feedback: str, *, score: float | None = None, weight: float = 1.0) -> dict[str, Subgraph]:
        """Send feedback about this value backward: parameter name to its minimal subgraph.

        Nothing stays on the graph; calling again with other feedback gives an independent answer.

        Raises:
            UserError: the feedback is not a text.
        """
        trace = self.trace
        return backward(trace, [Feedback(cast("int", trace.output_id), feedback, score, weight)])

    def clone(self) -> Node:
        """A new Node with the same value whose parent is this one."""
        rec, value = self._current()
        return make(CLONE, (rec,), _working_copy(value))

    def detach(self) -> Node:
        """A new Node with a deep copy of the value and no parents."""
        return Node(copy.deepcopy(self._current()[1]), name=f"{self.name}_copy", description=self.description)

    __copy__ = clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Node:
        return self.detach()

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Node is not pickled; pass node.value, or save the trace with node.trace.save(path)")

    def __repr__(self) -> str:
        return f"Node({self.name}={summarize(self._live, 80)})"

    __hash__ = object.__hash__

    if TYPE_CHECKING:
        # Installed by agentopt.graph._operators; listed here for type checkers.
        def __add__(self, other: Any) -> Any: ...
        def __radd__(self, other: Any) -> Any: ...
        def __sub__(self, other: Any) -> Any: ...
        def __rsub__(self, other: Any) -> Any: ...
        def __mul__(self, other: Any) -> Any: ...
        def __rmul__(self, other: Any) -> Any: ...
        def __truediv__(self, other: Any) -> Any: ...
        def __rtruediv__(self, other: Any) -> Any: ...
        def __floordiv__(self, other: Any) -> Any: ...
        def __rfloordiv__(self, other: Any) -> Any: ...
        def __mod__(self, other: Any) -> Any: ...
        def __rmod__(self, other: Any) -> Any: ...
        def __pow__(self, other: Any) -> Any: ...
        def __rpow__(self, other: Any) -> Any: ...
        def __matmul__(self, other: Any) -> Any: ...
        def __rmatmul__(self, other: Any) -> Any: ...
        def __divmod__(self, other: Any) -> Any: ...
        def __rdivmod__(self, other: Any) -> Any: ...
        def __and__(self, other: Any) -> Any: ...
        def __rand__(self, other: Any) -> Any: ...
        def __or__(self, other: Any) -> Any: ...
        def __ror__(self, other: Any) -> Any: ...
        def __xor__(self, other: Any) -> Any: ...
        def __rxor__(self, other: Any) -> Any: ...
        def __lshift__(self, other: Any) -> Any: ...
        def __rlshift__(self, other: Any) -> Any: ...
        def __rshift__(self, other: Any) -> Any: ...
        def __rrshift__(self, other: Any) -> Any: ...
        def __lt__(self, other: Any) -> Any: ...
        def __gt__(self, other: Any) -> Any: ...
        def __le__(self, other: Any) -> Any: ...
        def __ge__(self, other: Any) -> Any: ...
        def __neg__(self) -> Any: ...
        def __pos__(self) -> Any: ...
        def __invert__(self) -> Any: ...
        def __abs__(self) -> Any: ...
        def __floor__(self) -> Any: ...
        def __ceil__(self) -> Any: ...
        def __trunc__(self) -> Any: ...
        def __round__(self, digits: Any = None) -> Any: ...
        def __bytes__(self) -> bytes: ...
        def __int__(self) -> int: ...
        def __float__(self) -> float: ...
        def __complex__(self) -> complex: ...
        def __index__(self) -> int: ...
        def __bool__(self) -> bool: ...
        def __len__(self) -> int: ...
        def __contains__(self, item: Any) -> bool: ...
        def __getitem__(self, index: Any) -> Any: ...
        def __setitem__(self, index: Any, value: Any) -> None: ...
        def __delitem__(self, index: Any) -> None: ...
        def __iter__(self) -> Iterator[Any]: ...
        def __getattr__(self, name: str) -> Any: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
        def getattr(self, name: str) -> Any: ...
        def call(self, name: str, *args: Any, **kwargs: Any) -> Any: ...


class Parameter(Node):
    """A trainable leaf. `value` is the active candidate's value for its name, else the one set here.

    Optimizers address it by its name; `value = …` checks the constraint and replaces the value.
    """

    __slots__ = ("_spec",)

    _spec: ParameterSpec

    def __init__(self, value: Any, spec: ParameterSpec) -> None:
        self._spec = spec
        self._live = value
        self._rec = self._leaf(value)

    def _leaf(self, value: Any) -> Rec:
        spec = self._spec
        text = spec.constraint_text or None
        op = Op(
            spec.name, kind="parameter", description=spec.description or None, constraint=text, parameter_kind=spec.kind
        )
        return Rec(op, (), settle(value), 0)

    @property
    def spec(self) -> ParameterSpec:
        """The declaration: name, kind, default, constraint."""
        return self._spec

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def description(self) -> str | None:
        return self._spec.description or None

    @property
    def trainable(self) -> bool:
        return True

    @property
    def value(self) -> Any:
        """The plain value that is active here; setting it replaces the value used where no candidate is active."""
        rec, value = self._current()
        note_read(rec, "parameter")
        return value

    @value.setter
    def value(self, value: Any) -> None:
        self._live = checked(self._spec, value)
        self._rec = self._leaf(self._live)

    def _current(self) -> tuple[Rec | LiveOp, Any]:
        found = _active(self._spec)
        if found is _MISSING:
            if type(self._live) in MUTABLE_CONTAINERS and _changed(self._live, self._rec.value):
                self._rec = self._leaf(self._live)
            return self._rec, self._live
        frame = _current()
        recording = None if frame is None else frame.recording
        if recording is None:
            return self._leaf(found), found
        leaf = recording.leaves.get(self._spec.name)
        if leaf is None or leaf.value != found:
            leaf = recording.leaves[self._spec.name] = self._leaf(found)
        return leaf, found

    def detach(self) -> Parameter:
        """A parameter of its own (named `<name>_copy`, not declared) with a deep copy of the value."""
        value = copy.deepcopy(self._current()[1])
        spec = ParameterSpec(f"{self._spec.name}_copy", self._spec.kind, None, description=self._spec.description)
        spec.constraint, spec.constraint_text = self._spec.constraint, self._spec.constraint_text
        spec.projection = self._spec.projection
        return Parameter(value, spec)

    def __repr__(self) -> str:
        return f"Parameter({self._spec.name}={summarize(self._live, 80)})"


def checked(spec: ParameterSpec, value: Any) -> Any:
    """Project `value` and check it against the constraint.

    Raises:
        UserError: the constraint refuses the value.
    """
    value = spec.project(value)
    problems = spec.problems(value)
    if problems:
        raise UserError(f"parameter {spec.name!r} cannot be {summarize(value, 80)}: {'; '.join(problems)}")
    return value


_MISSING: Final = object()


def _active(spec: ParameterSpec) -> Any:
    """The active candidate's value for a declared parameter, `_MISSING` when there is none."""
    if not spec.file:
        return _MISSING
    candidate = _context.overlay.get()
    if candidate is None:
        if _context._active_scopes:
            raise _context._lost(spec)
        candidate = _context._installed
    if spec.import_time_read is None:
        running = _current() is not None or candidate is not None or spec.read_normally
        _context._note_import_time(spec, running=running)
    if candidate is None or spec.name not in candidate._values:
        return _MISSING
    return copied(candidate._values[spec.name])


_anonymous: Final = itertools.count(1).__next__


def node(
    value: Any,
    *,
    trainable: bool = False,
    name: str | None = None,
    description: str | None = None,
    constraint: Callable[[Any], bool | str | None] | str | None = None,
    projection: Callable[[Any], Any] | None = None,
) -> Node:
    """Make a Node of `value`; a Node is given back as it is, a container of Nodes keeps their provenance.

    With `trainable=True` this is a leaf that optimizers may change (see `parameter`); without a name it gets one that
    is unique in this process, and no candidate can address it.

    Raises:
        UserError: the constraint refuses the value, or the name is declared with another default.
    """
    if trainable:
        return _parameter(value, name, description, constraint, projection, sys._getframe(1))
    if isinstance(value, Node):
        return value
    packed = pack(value)
    return packed if packed is not None else Node(value, name=name, description=description)


def parameter(
    value: Any,
    *,
    name: str,
    description: str | None = None,
    constraint: Callable[[Any], bool | str | None] | str | None = None,
    projection: Callable[[Any], Any] | None = None,
) -> Parameter:
    """Declare a trainable value: a leaf of the graph that optimizers may change and candidates address by `name`.

    `constraint` is a text shown to the optimizer, or a callable: False or a text refuses a value. `projection` is
    applied to every proposed value before the check.

    Raises:
        UserError: the constraint refuses the value, or the name is declared with another default.
    """
    return _parameter(value, name, description, constraint, projection, sys._getframe(1))


def _parameter(
    value: Any,
    name: str | None,
    description: str | None,
    constraint: Callable[[Any], bool | str | None] | str | None,
    projection: Callable[[Any], Any] | None,
    frame: Any,
) -> Parameter:
    if isinstance(value, Node):
        name, value = name or (value.name if isinstance(value, Parameter) else None), value._current()[1]
    spec = ParameterSpec(name or f"parameter{_anonymous()}", "value", None, description=description or "")
    if isinstance(constraint, str):
        spec.constraint_text = constraint
    elif constraint is not None:
        spec.constraint = constraint
        spec.constraint_text = (constraint.__doc__ or "").strip().partition("\n")[0]
    spec.projection = projection
    value = checked(spec, value)
    if name is not None:
        try:
            spec.default = normalize(value, f"parameter {name!r}")
        except UserError:
            return Parameter(value, spec)  # no JSON form: trainable here, but no candidate can hold it
        spec = declare(spec, frame)
    return Parameter(value, spec)


# --- making Nodes ----------------------------------------------------------------------------------------------------


def make(op: Op, inputs: tuple[Any, ...], value: Any) -> Node:
    """A Node for the result `value` of `op` on `inputs` (records, or settled plain values)."""
    frame = _current()
    made = _new(Node)
    made._live = value
    if frame is None:
        made._rec = Rec(op, inputs, value if type(value) in ATOMS else settle(value), 0)
        return made
    rec = made._rec = Rec(op, inputs, value if type(value) in ATOMS else settle(value), frame.open_id)
    if frame.recording is not None:
        frame.recording.collect(rec)
    return made


_new: Final[Callable[[type[Node]], Node]] = Node.__new__


def from_record(rec: Rec | LiveOp, value: Any) -> Node:
    """A Node on an existing record."""
    made = _new(Node)
    made._rec, made._live = rec, value
    return made


def failed(op: Op, inputs: tuple[Any, ...], error: Exception) -> ExecutionError:
    """Record that `op` failed on `inputs`, and give the error to raise."""
    frame = _current()
    live = LiveOp(op, inputs, frame, None if frame is None else frame.recording)
    live.error, live.failed_at = describe(error, live)
    live.finish(None)
    return execution_error(from_record(live, None), error)


def tracing() -> bool:
    """Whether operations on Nodes are recorded here."""
    frame = _current()
    return frame is None or frame.tracing


def take(value: Any) -> tuple[Any, Any]:
    """What an operation records for an argument, and the plain value it works on."""
    kind = kind_of(value)
    if kind in ATOMS:
        return value, value
    if isinstance(value, Node):
        return value._current()
    if isinstance(value, Handle):
        return _read_handle(value)
    if kind in CONTAINERS:
        packed = pack(value)
        if packed is not None:
            return packed._rec, packed._live
        return settle(value), value
    return value, value


def _read_handle(handle: Handle) -> tuple[Rec, Any]:
    """A leaf for a handle used as an operand, so that its parameter is reached without a recording too."""
    value, spec = handle.value, handle.spec
    text = spec.constraint_text or None
    op = Op(
        spec.name, kind="parameter", description=spec.description or None, constraint=text, parameter_kind=spec.kind
    )
    return Rec(op, (), settle(value), 0), value


def plain(value: Any) -> Any:
    """The value without Nodes, also inside containers; nothing is recorded but the reads."""
    if isinstance(value, Node):
        return value.value
    kind = kind_of(value)
    if kind in CONTAINERS and kind is not bytearray and _has_nodes(value):
        if kind is dict:
            return {plain(key): plain(item) for key, item in cast("dict[Any, Any]", value).items()}
        return cast("Any", kind)(plain(item) for item in value)
    return value


def pack(value: Any) -> Node | None:
    """Make a Node of a container that holds Nodes, with them as parents; None for a value that holds none."""
    kind = kind_of(value)
    if kind not in _PACKS or not _has_nodes(value):
        return None
    shared = _PACKS[kind]
    if kind is dict:
        source = cast("dict[Any, Any]", value)
        names = tuple(str(plain(key)) for key in source)
        taken = [take(item) for item in source.values()]
        working: Any = dict(zip((plain(key) for key in source), (item for _, item in taken), strict=True))
    else:
        items = list(cast("Iterable[Any]", value))
        names = tuple(f"item_{place}" for place in range(len(items)))
        taken = [take(item) for item in items]
        working = cast("Any", kind)(item for _, item in taken)
    op = Op(shared.name, names, description=shared.description)
    return make(op, tuple(entry for entry, _ in taken), working)


def _has_nodes(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Mapping):
        mapping = cast("Mapping[Any, Any]", value)
        return any(isinstance(key, Node) for key in mapping) or _has_nodes(list(mapping.values()), depth)
    for item in value:
        kind = kind_of(item)
        if kind in ATOMS:
            continue
        if isinstance(item, Node) or (depth < 4 and kind in _PACKS and _has_nodes(item, depth + 1)):
            return True
    return False


def _working_copy(value: Any) -> Any:
    return settle(value) if type(value) in CONTAINERS else value


def _changed(value: Any, recorded: Any) -> bool:
    if value is recorded:
        return False
    try:
        return bool(value != recorded)
    except Exception:  # noqa: BLE001 - items that cannot be compared (arrays): taken as unchanged
        return False


def _collected(rec: Rec) -> Rec:
    frame = _current()
    if frame is not None and frame.recording is not None:
        frame.recording.collect(rec)
    return rec


def _scope() -> int:
    frame = _current()
    return 0 if frame is None else frame.open_id
