"""The constructor is the schema: nodes of plain data become objects, and are checked against signatures.

A node is a dict with `_target_` (the dotted path of a class or factory); every other key is one of its
keyword arguments. `_partial_: true` makes a `functools.partial` that waits for run-time objects as positional
arguments. `check` reports everything that would go wrong without building anything; `make` builds. Both see
only plain dicts and lists, so nothing here knows where a configuration came from.

Types are read with pydantic, strict for scalars ("3", 2.0 and True are not an int) inside lax containers (a
YAML list becomes the tuple that was annotated).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, ConfigDict, PydanticUserError, Strict, TypeAdapter, ValidationError

from vit_train.errors import CheckpointError, ConfigError, blame
from vit_train.text import suggest

TARGET, PARTIAL = "_target_", "_partial_"
# Numbers with their bounds, for constructors whose arguments users type; none is infinite or NaN. What makes
# processes, layers or memory ends where nobody needs more.
_MOST = 2**31 - 1  # a larger count would overflow somewhere
Positive = Annotated[int, Ge(1), Le(_MOST)]
NotNegative = Annotated[int, Ge(0), Le(_MOST)]
TwoOrMore = Annotated[int, Ge(2), Le(_MOST)]
Workers = Annotated[int, Ge(0), Le(256)]
Threads = Annotated[int, Ge(1), Le(256)]
Few = Annotated[int, Ge(1), Le(1000)]
Level = Annotated[int, Ge(0), Le(255)]
Dim = Annotated[int, Ge(1), Le(2**16)]
Window = Annotated[int, Ge(1), Le(256)]
Side = Annotated[int, Ge(1), Le(2**14)]
Seed = Annotated[int, Ge(-(2**63)), Lt(2**63)]
PositiveFloat = Annotated[float, Gt(0)]
NotNegativeFloat = Annotated[float, Ge(0)]
Seconds = Annotated[float, Gt(0), Le(10**6)]  # poll() counts milliseconds in 31 bits
Expansion = Annotated[float, Gt(0), Le(1000)]
Probability = Annotated[float, Ge(0), Le(1)]
Fraction = Annotated[float, Ge(0), Lt(1)]
Share = Annotated[float, Gt(0), Le(1)]
_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_SCALARS = (int, float, bool, str)
_MUST_BE = {
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "finite_number": "a finite number",
    "value_error": "{error}",
}


def _in_order(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError("in ascending order")
    return values


_Ratio = Annotated[float, Ge(0.1), Le(10)]  # beyond, a part of a small image would have no pixels
Ratios = Annotated[tuple[_Ratio, _Ratio], AfterValidator(_in_order)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_in_order)]


def is_node(value: object) -> bool:
    """Whether `value` is a dict that names a `_target_`."""
    return isinstance(value, Mapping) and TARGET in value


def locate(path: Any, allow: tuple[str, ...] | None = None) -> Any:
    """Imports the object a dotted path names.

    Args:
        path: such as vit_train.models.ViT.
        allow: packages it may come from; None allows everything. What is allowed is a public class or
            function of a module in them that is defined in them as well: `vit_train.models.vit.torch.load`
            is not, nor is a method.

    Raises:
        ConfigError: nothing importable has that name (a close name in the same module is suggested), or it is
            not allowed.
        CheckpointError: it is allowed, and its module cannot be imported.
    """
    if allow is not None:
        return _locate_inside(path, allow)
    if not isinstance(path, str) or "." not in path:
        raise ConfigError(f"{path!r} is not a dotted path such as vit_train.models.ViT")
    module_path, name = path.rsplit(".", 1)
    module: Any
    try:
        module = importlib.import_module(module_path)
    except ImportError as error:
        # A nested class: `package.module.Outer.Inner`
        try:
            module = locate(module_path)
        except ConfigError:
            raise ConfigError(f"cannot import {module_path!r}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        public = [n for n in dir(module) if not n.startswith("_")]
        raise ConfigError(f"{module_path!r} has no {name!r}{suggest(name, public)}") from None


def _locate_inside(path: Any, allow: tuple[str, ...]) -> Any:
    # Before importing: importing a module already runs code.
    module_path, _, name = path.rpartition(".") if isinstance(path, str) else ("", "", "")
    # a package may offer what one of its modules defines, which is looked at below
    offers = any(prefix.startswith(f"{module_path}.") for prefix in allow)
    if not (offers or _inside(module_path, allow)) or not all(
        part.isidentifier() for part in path.split(".")
    ):
        raise ConfigError(f"stored data may name only {', '.join(allow)}, not {path!r}")
    try:
        target = getattr(importlib.import_module(module_path), name, None)
    except (Exception, SystemExit) as error:  # whatever code that is trusted raises
        absent = isinstance(error, ModuleNotFoundError) and f"{module_path}.".startswith(f"{error.name}.")
        if not absent:  # it is there, and lacks another or is broken
            raise CheckpointError(f"{path} cannot be imported: {' '.join(str(error).split())}") from error
        target = None
    if name.startswith("_") or not callable(target) or not _inside(getattr(target, "__module__", 0), allow):
        raise ConfigError(f"{path} is not defined in {', '.join(allow)}: not built")
    return target


def _inside(module: Any, allow: tuple[str, ...]) -> bool:
    return isinstance(module, str) and any(module == p or module.startswith(f"{p}.") for p in allow)


def make(node: Any, *, key: str = "", allow: Iterable[str] | None = None) -> Any:
    """Builds the objects a node describes, innermost first.

    Args:
        node: a node, or any plain value (returned with the nodes inside it built).
        key: where the node stands in the configuration, for messages.
        allow: package prefixes `_target_` may come from; None allows everything (the user's own config).

    Raises:
        ConfigError: the target cannot be found, is not allowed, or refused its arguments; or what an inner
            node makes is not what its place is annotated with.
    """
    if isinstance(node, list | tuple):
        return [make(value, key=f"{key}[{i}]", allow=allow) for i, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    if TARGET not in node:
        return {name: make(value, key=_join(key, name), allow=allow) for name, value in node.items()}
    try:
        target = locate(node[TARGET], None if allow is None else tuple(allow))
    except ConfigError as error:
        raise ConfigError(f"{_join(key, TARGET)}: {error}") from error
    known, arguments = parameters(target), {}
    for name, value in node.items():
        if name in (TARGET, PARTIAL):
            continue
        full = _join(key, name)
        hint = known[name].annotation if name in known else Any
        arguments[name] = _fitted(full, hint, make(value, key=full, allow=allow), value)
    if node.get(PARTIAL, False):
        return functools.partial(target, **arguments)
    with as_config_error(key):
        return target(**arguments)


def as_config_error(key: str) -> AbstractContextManager[None]:
    """A value that a constructor or torch refuses is a mistake in the configuration."""
    return blame(ConfigError, key, (ValueError, TypeError, ArithmeticError, RuntimeError, OSError))


def check(node: Any, *, key: str = "", pending: frozenset[str] = frozenset()) -> list[str]:
    """Every error in a tree of nodes, as lines that start with the full key. Builds nothing.

    Args:
        node: a node, or plain data that may hold nodes.
        key: where it stands in the configuration.
        pending: full keys whose values arrive at run time (class count, image size) and are not checked.
    """
    errors = []
    for full, inner in _nodes(node, key):
        try:
            target = locate(inner[TARGET])
        except ConfigError as error:
            errors.append(f"{_join(full, TARGET)}: {error}")
            continue
        if callable(target):
            errors += _check_arguments(target, inner, full, pending)
        else:
            errors.append(f"{_join(full, TARGET)}: {inner[TARGET]} is not a class or function")
    return errors


def _nodes(tree: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Full key and content of every node in a tree of plain data, innermost first."""
    inside: list[tuple[str, Any]] = []
    if isinstance(tree, Mapping):
        inside = [(_join(key, str(name)), value) for name, value in tree.items()]
    elif isinstance(tree, list | tuple):
        inside = [(f"{key}[{i}]", value) for i, value in enumerate(tree)]
    for full, value in inside:
        yield from _nodes(value, full)
    if is_node(tree):
        yield key, tree


def foreign_code(node: Any, allow: tuple[str, ...], key: str = "") -> list[tuple[str, str]]:
    """`key._target_` and path of every node that names code it may not; see `locate`. Imports what it may."""
    found = []
    for full, inner in _nodes(node, key):
        try:
            locate(inner[TARGET], allow)
        except ConfigError:
            found.append((_join(full, TARGET), " ".join(str(inner[TARGET]).split())))
    return found


def with_defaults(node: Mapping[str, Any], *, inherited: bool = False) -> dict[str, Any]:
    """The node with the constructor's own defaults for the keys it leaves out.

    Of a class of the user's these are the ones it names: it may hand others to its base class, whose own
    defaults count only where they are to be `inherited`.
    """
    target = locate(node[TARGET])
    ours = _inside(getattr(target, "__module__", None), ("vit_train",))
    known = parameters(target, inherited=ours or inherited).values()
    defaults = {
        p.name: list(p.default) if isinstance(p.default, tuple) else p.default
        for p in known
        if p.kind is p.KEYWORD_ONLY and p.default is not p.empty
    }
    return {**defaults, **node}


def _check_arguments(
    target: Callable[..., Any], node: Mapping[str, Any], key: str, pending: frozenset[str]
) -> list[str]:
    known, owner = parameters(target), str(node[TARGET]).rpartition(".")[2]
    keywords = [n for n, p in known.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    partial = node.get(PARTIAL, False)
    errors = []
    if not isinstance(partial, bool):
        errors.append(f"{_join(key, PARTIAL)}: expected true or false, got {partial!r}")
    for name, value in node.items():
        full = _join(key, str(name))
        if name in (TARGET, PARTIAL) or full in pending:
            continue
        if name in keywords:
            errors += _check_value(full, known[name].annotation, value)
        elif not takes_any:
            it_has = ", ".join(n for n in keywords if not (partial and known[n].kind is not _KEYWORD))
            inside = [child for child, held in node.items() if isinstance(held, Mapping) and name in held]
            meant = f"; did you mean '{_join(key, f'{inside[0]}.{name}')}'?" if inside else ""
            guess = meant or suggest(str(name), keywords, inside=key) or f" (it has: {it_has})"
            errors.append(f"{full}: {owner} has no such key{guess}")
    for name, parameter in known.items():
        required = parameter.default is parameter.empty and name in keywords
        arrives_later = partial and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if required and name not in node and not arrives_later:
            errors.append(f"{_join(key, name)}: missing, {owner} needs it")
    return errors


def _check_value(full: str, hint: Any, value: Any) -> list[str]:
    if is_node(value):
        return _check_child(full, hint, value)
    if any(_nodes(value)):
        return []  # walked already; what the container holds exists only once it is built
    try:
        _adapter(hint).validate_python(value)
    except ValidationError as error:
        return [_explain(full, hint, value, error)]
    except PydanticUserError:  # an annotation it can make nothing of
        return []
    return []


def _check_child(full: str, hint: Any, node: Mapping[str, Any]) -> list[str]:
    """A child node is compared by class where the annotation is a class and the child is one."""
    try:
        target = locate(node[TARGET])
    except ConfigError:
        return []  # reported by the walk
    members = [t for t in _members(hint) if t is not type(None)]
    accepted = [t for t in members if inspect.isclass(t) and t not in (Any, object) and not _is_protocol(t)]
    open_ended = not accepted or len(accepted) < len(members) or node.get(PARTIAL, False)
    if open_ended or not inspect.isclass(target) or issubclass(target, tuple(accepted)):
        return []
    names = " or ".join(t.__name__ for t in accepted)
    return [f"{full}: expected {names}, got {target.__name__} ({node[TARGET]})"]


def _explain(full: str, hint: Any, value: Any, error: ValidationError) -> str:
    choices = [str(c) for t in _members(hint) if get_origin(t) is Literal for c in get_args(t)]
    problems = error.errors()
    problem = next((p for p in problems if p["type"] in _MUST_BE), problems[0])
    names = [str(part) for part in problem["loc"] if isinstance(value, Mapping) and part in value]
    where = ".".join(str(part) for part in problem["loc"] if isinstance(part, int) and not names)
    inside = f" (at position {where})" if where else ""
    if problem["type"] in _MUST_BE:
        limits = {k: f"{v:g}" if isinstance(v, float) else v for k, v in problem.get("ctx", {}).items()}
        either = "" if inside or names else "".join(f"{choice} or " for choice in choices)
        must = either + _MUST_BE[problem["type"]].format(**limits)
        return f"{'.'.join([full, *names])}: must be {must}, got {problem['input']!r}{inside}"
    shown = "null" if value is None else repr(value)
    if choices:
        others = [_name(t) for t in _members(hint) if get_origin(t) is not Literal and t is not type(None)]
        return f"{full}: {shown} is not one of {', '.join(choices + others)}{suggest(str(value), choices)}"
    kind = "" if value is None else f" ({type(value).__name__})"
    return f"{full}: expected {_name(hint)}, got {shown}{kind}{inside}"


def _name(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if isinstance(hint, types.UnionType) or origin is Union:
        return " or ".join(_name(t) for t in arguments)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Callable:
        return "Callable"
    if origin is not None:
        return f"{_name(origin)}[{', '.join('...' if t is Ellipsis else _name(t) for t in arguments)}]"
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _fitted(full: str, hint: Any, built: Any, value: Any) -> Any:
    """Plain values become the annotated types (list -> tuple); what a node makes must be of them already.

    Raises:
        ConfigError: it is not.
    """
    try:
        return _adapter(hint).validate_python(built)
    except (ValidationError, PydanticUserError) as error:
        if not any(_nodes(value)) or isinstance(error, PydanticUserError):
            return built  # `check` reports it; here the constructor has the last word
        made = repr(built) if isinstance(built, _SCALARS) else type(built).__name__
        maker = value[TARGET] if is_node(value) else "it"
        raise ConfigError(f"{full}: expected {_name(hint)}, {maker} makes {made}") from error


def _members(hint: Any) -> tuple[Any, ...]:
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return get_args(hint)
    return (hint,)


def _is_protocol(hint: Any) -> bool:
    return inspect.isclass(hint) and getattr(hint, "_is_protocol", False)


def parameters(target: Callable[..., Any], *, inherited: bool = True) -> dict[str, inspect.Parameter]:
    """The arguments of a class or function, with annotations resolved: one that cannot be counts as Any.

    The `**options` of a constructor are what else its base class takes, unless `inherited` is false.
    """
    found: dict[str, inspect.Parameter] = {}
    classes = target.__mro__[:-1] if inspect.isclass(target) else ()
    constructors = [vars(owner)["__init__"] for owner in classes if "__init__" in vars(owner)]
    for owner in constructors or [target]:
        try:
            own = list(inspect.signature(owner).parameters.values())[bool(constructors) :]  # without self
        except ValueError:  # a builtin without a signature takes anything
            own = list(inspect.signature(lambda **_: None).parameters.values())
        scope = {**vars(typing), **getattr(inspect.unwrap(owner), "__globals__", {})}
        known = {p.name: p.replace(annotation=_resolved(p.annotation, scope)) for p in own}
        rest = [name for name, p in known.items() if p.kind is p.VAR_KEYWORD]
        found = {n: p for n, p in found.items() if p.kind is not p.VAR_KEYWORD}
        found = {**found, **{name: p for name, p in known.items() if name not in found}}
        if not (rest and inherited):
            break
    return found


def _resolved(annotation: Any, scope: dict[str, Any]) -> Any:
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, scope)  # our own source, as typing.get_type_hints does
        except Exception:
            return Any
    return Any if annotation is inspect.Parameter.empty else annotation


def _strict(hint: Any) -> Any:
    """The same annotation with strict scalars inside lax containers; what cannot be checked becomes Any."""
    if inspect.isclass(hint) and not get_args(hint):
        if hint in _SCALARS or issubclass(hint, Enum):
            return Annotated[hint, Strict()]
        if _is_protocol(hint) or (hint.__module__.split(".")[0] == "torch" and hint.__name__ == "Tensor"):
            return Any
        return hint
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (None, Literal, type, Callable) or not arguments:
        return hint
    if origin is Annotated:
        return Annotated[(_strict(arguments[0]), *hint.__metadata__)]
    if isinstance(hint, types.UnionType) or origin is Union:
        return Union[tuple(_strict(a) for a in arguments)]  # noqa: UP007 - built from a tuple
    if _is_protocol(origin):
        return Any
    return origin[tuple(a if a is Ellipsis else _strict(a) for a in arguments)]


def _adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        return _cached_adapter(hint)
    except TypeError:  # unhashable annotation
        return _cached_adapter.__wrapped__(hint)


@functools.cache
def _cached_adapter(hint: Any) -> TypeAdapter[Any]:
    try:
        config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        return TypeAdapter(_strict(hint), config=config)
    except Exception:
        return TypeAdapter(Any)
