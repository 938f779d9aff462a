"""Which parameters form a unit: by default the blocks of the model, with small leftovers joined to a neighbour."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn
from zs_comm import ConfigError

UnitChoice = Iterable[type[nn.Module] | str] | Callable[[str, nn.Module], bool] | None


@dataclass
class UnitSpec:
    """A unit before planning: modules whose forward needs it and its parameters, by name."""

    name: str
    modules: list[str] = field(default_factory=list)
    params: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        return sum(param.numel() for param in self.params.values())


def choose_units(
    model: nn.Module, choice: UnitChoice = None, *, ignored: frozenset[int] = frozenset()
) -> list[UnitSpec]:
    """Groups the parameters of `model` (except those whose id is in `ignored`) into units, in definition order.

    `choice` names the modules that become units: classes, qualified names, or `callable(name, module) -> bool`. Without
    it every element of a list of like modules (the blocks) and every larger module outside of them becomes one, and a
    smaller one joins its neighbour. A parameter reached from several units gets a unit of its own, needed by each
    module that holds it.

    Raises:
        ConfigError: when a name or class of `choice` matches no module.
    """
    modules = dict(model.named_modules())
    selected = _selected(modules, choice) if choice is not None else _default_modules(model)
    owners: dict[int, list[str]] = {}  # parameter -> modules that hold it directly
    names: dict[int, tuple[str, nn.Parameter]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for leaf, param in module._parameters.items():
            if param is not None and id(param) not in ignored:
                holders = owners.setdefault(id(param), [])
                if module_name not in holders:
                    holders.append(module_name)
                names.setdefault(id(param), (f"{module_name}.{leaf}" if module_name else leaf, param))
    everywhere = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in model.named_modules()}
    named = Counter(id(module) for module in everywhere.values())
    several = {key: name for key, name in first_names.items() if named[key] > 1}
    units: dict[str, UnitSpec] = {}
    for key, (name, param) in names.items():
        homes = dict.fromkeys(_home(module_name, selected) for module_name in owners[key])
        roots = {_shared_root(module_name, several, everywhere) for module_name in owners[key]}
        root = roots.pop() if len(roots) == 1 else None
        if len(homes) > 1 and root is not None:  # a module in several places: entered under any of its names
            unit = units.setdefault(f"{root} (shared)", UnitSpec(f"{root} (shared)", [root]))
        elif len(homes) == 1:
            home = next(iter(homes))
            unit = units.setdefault(home, UnitSpec(home, [home]))
        else:
            unit = units.setdefault(f"{name} (shared)", UnitSpec(f"{name} (shared)", list(owners[key])))
        unit.params[name] = param
    ordered = [unit for unit in units.values() if unit.params]
    return ordered if choice is not None else _join_small(ordered, has_blocks=_blocks(model) != [])


def _selected(modules: dict[str, nn.Module], choice: UnitChoice) -> set[str]:
    if callable(choice):
        return {name for name, module in modules.items() if name and choice(name, module)}
    selected: set[str] = set()
    for item in choice or ():
        if isinstance(item, str):
            found = {item} & modules.keys()
        else:
            found = {name for name, module in modules.items() if isinstance(module, item) and _is_called(module)}
        if not found:
            known = sorted({type(module).__name__ for module in modules.values()})
            raise ConfigError(f"units: {item!r} matches no module of the model (module classes: {', '.join(known)})")
        selected |= found
    return selected - {""}


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)  # attention uses its weight only


def _blocks(model: nn.Module) -> list[str]:
    """Elements of the outermost lists of at least two modules of one class with parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name == block or name.startswith(block + ".") for block in found):
            continue
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) >= 2:
            kinds = {type(child) for child in module}
            has_params = all(next(child.parameters(), None) is not None for child in module)
            if len(kinds) == 1 and has_params and next(iter(kinds)) is not nn.Sequential:
                found += [f"{name}.{index}" if name else str(index) for index in range(len(module))]
    return found


def _default_modules(model: nn.Module) -> set[str]:
    blocks = _blocks(model)
    selected = set(blocks)

    def visit(name: str, module: nn.Module) -> None:
        for child_name, child in module.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if path in selected or next(child.parameters(), None) is None:
                continue
            if any(block.startswith(path + ".") for block in blocks):
                visit(path, child)  # it contains blocks: its other children are units of their own
            elif isinstance(child, nn.ModuleList | nn.ModuleDict | nn.ParameterList | nn.ParameterDict):
                visit(path, child)  # a plain container is never called, so it cannot be what a forward enters
            else:
                selected.add(path)

    visit("", model)
    return selected


def _home(module_name: str, selected: set[str]) -> str:
    """The innermost selected module that contains `module_name`, else the root."""
    parts = module_name.split(".") if module_name else []
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        if candidate in selected:
            return candidate
    return ""


def _shared_root(path: str, several: dict[int, str], everywhere: dict[str, nn.Module]) -> str | None:
    """The first name of the outermost module around `path` that has several names, if one has."""
    parts = path.split(".") if path else []
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((several[id(everywhere[p])] for p in prefixes if id(everywhere[p]) in several), None)


def _join_small(units: Sequence[UnitSpec], *, has_blocks: bool) -> list[UnitSpec]:
    """Joins units much smaller than the rest to the next one (the last to the one before it)."""
    if len(units) < 2:
        return list(units)
    sizes = sorted(unit.numel for unit in units)
    limit = sizes[len(sizes) // 2] // 4 if has_blocks else max(sum(sizes) // 8, 1)
    joined: list[UnitSpec] = []
    waiting: list[UnitSpec] = []
    for unit in units:
        # the root is entered before everything and left last: joining it would keep its neighbour whole for as long
        fixed = "" in unit.modules or unit.name.endswith("(shared)")
        if not fixed and unit.numel < limit:
            waiting.append(unit)
            if not has_blocks and sum(small.numel for small in waiting) >= limit:
                joined.append(_merge(waiting))
                waiting = []
        elif not fixed:
            joined.append(_merge([*waiting, unit]) if waiting else unit)
            waiting = []
        else:
            joined.append(unit)
    if waiting:
        last = next((i for i in reversed(range(len(joined))) if not _is_fixed(joined[i])), None)
        if last is None:
            joined.append(_merge(waiting))
        else:
            joined[last] = _merge([joined[last], *waiting])
    return joined


def _is_fixed(unit: UnitSpec) -> bool:
    return "" in unit.modules or unit.name.endswith("(shared)")


def _merge(units: Sequence[UnitSpec]) -> UnitSpec:
    merged = UnitSpec("+".join(unit.name for unit in units))
    for unit in units:
        merged.modules += unit.modules
        merged.params |= unit.params
    return merged
