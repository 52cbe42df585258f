"""``Plan``: what to compare, as a product of lists, and the graph of victims and cells that it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unbackdoor import specs
from unbackdoor.attacks.poisoning import TextContamination
from unbackdoor.attacks.recipes import adjusted, usual
from unbackdoor.bench.jobs import CellJob, Subject, VictimJob, network_fields
from unbackdoor.data.named import DatasetInfo, dataset_info
from unbackdoor.errors import ConfigError
from unbackdoor.evaluation.checks import ATTACK_TOOK

#: What each method is compared with, by default.
DEFENSES = ("ft", "seam", "ulrl")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every data set × network × attack × victim seed is planted, and cleaned by every defense × budget × seed.

    Attributes:
        datasets: names of data sets.
        archs: specs of networks; None is the usual one for the data set.
        attacks: specs of attacks; None is a network without a backdoor, which shows what a removal costs.
        victim_seeds: of the planting.
        defenses: specs of defenses. One that augments and does not say how does so as suits the data set.
        per_class: budgets, as clean samples of each class.
        shares: budgets, as a share of the training set in (0, 1]; it is spread evenly over the classes.
        seeds: of the clean samples and the defense.
        recipe: fields of :class:`~unbackdoor.training.Recipe` in place of the data set's usual ones; ``epochs`` above
            all.
        min_asr: an attack that succeeds on fewer than this share of the triggered test images did not take: its cells
            are skipped. 0 cleans every victim.

    Raises:
        ConfigError: an empty or wrong list, or no budget; the message says what would be right.
    """

    datasets: Sequence[str] = ("digits",)
    archs: Sequence[str | None] = (None,)
    attacks: Sequence[str | None] = ("badnets", None)
    victim_seeds: Sequence[int] = (0,)
    defenses: Sequence[str] = DEFENSES
    per_class: Sequence[int] = ()
    shares: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    min_asr: float = ATTACK_TOOK

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name in ("recipe", "min_asr"):
                continue
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise ConfigError(f"a plan's {each.name} must be a list, such as [{value!r}], not {value!r}")
            if not value and each.name not in ("per_class", "shares"):
                raise ConfigError(f"a plan's {each.name} must not be empty")
        if not self.per_class and not self.shares:
            raise ConfigError("a plan needs a budget of clean samples: per_class=[10], or shares=[0.01]")
        for name in ("seeds", "victim_seeds", "per_class"):
            least = 1 if name == "per_class" else 0
            for value in getattr(self, name):
                if isinstance(value, bool) or not isinstance(value, int) or value < least:
                    raise ConfigError(f"a plan's {name} must be whole numbers from {least}, not {value!r}")
        for share in self.shares:
            if not 0 < share <= 1:
                raise ConfigError(f"a plan's shares must lie in (0, 1], not {share!r}")
        if not 0 <= self.min_asr <= 1:
            raise ConfigError(f"a plan's min_asr must lie in [0, 1], not {self.min_asr!r}")


@dataclass(frozen=True)
class Graph:
    """Victims, and the cells that need them; each once, in the order in which they are wanted."""

    victims: tuple[VictimJob, ...]
    cells: tuple[CellJob, ...]


#: Data set -> how many training images it has.
TrainSize = Callable[[str], int]


def graph_of(plans: Plan | Iterable[Plan], train_size: TrainSize) -> Graph:
    """The graph of a plan, or of several as one: what they share is done once.

    Cells come seed by seed, and within a seed victim by victim, so that a run that is stopped has something on each.

    Args:
        train_size: called once a data set.

    Raises:
        ConfigError, DataError: something in a plan names nothing, or a target is no class.
    """
    plans = [plans] if isinstance(plans, Plan) else list(plans)
    sizes = {name: train_size(name) for name in dict.fromkeys(_name(n) for plan in plans for n in plan.datasets)}
    victims: dict[str, VictimJob] = {}
    ranked: list[tuple[int, CellJob]] = []
    for plan in plans:
        for dataset in plan.datasets:
            info = dataset_info(dataset)
            for victim in _victims(plan, info, sizes[info.name]):
                victim = victims.setdefault(victim.key, victim)
                ranked += [(rank, cell) for rank, cell in _cells(plan, info, victim)]
    cells: dict[str, CellJob] = {}
    for _, cell in sorted(ranked, key=lambda pair: pair[0]):  # stable
        cells.setdefault(cell.key, cell)
    return Graph(tuple(victims.values()), tuple(cells.values()))


def _name(dataset: str) -> str:
    return dataset_info(dataset).name


def _victims(plan: Plan, info: DatasetInfo, train_size: int) -> Iterable[VictimJob]:
    for seed in plan.victim_seeds:
        for arch in plan.archs:
            suits = usual(info.name, arch)
            recipe = adjusted(suits.recipe, plan.recipe)
            network_fields(suits.arch)  # raises where it is no spec
            for attack in plan.attacks:
                yield VictimJob(
                    dataset=info.name,
                    train_size=train_size,
                    arch=suits.arch,
                    attack=None if attack is None else _attack_text(attack, info),
                    recipe=recipe,
                    seed=seed,
                )


def _attack_text(attack: str, info: DatasetInfo) -> str:
    made = specs.build("attack", attack)
    if isinstance(made, TextContamination):
        raise ConfigError(f"{attack} rewrites texts, and {info.name} is a data set of images")
    made.check_target(info.num_classes)
    return specs.text_of(made, "attack")


def _cells(plan: Plan, info: DatasetInfo, victim: VictimJob) -> Iterable[tuple[int, CellJob]]:
    """(the place of its seed, a cell)."""
    budgets: list[tuple[int, float | None]] = [(count, None) for count in plan.per_class]
    budgets += [(max(1, round(share * victim.train_size / info.num_classes)), share) for share in plan.shares]
    for cell in cells_of(victim, [suited(d, info) for d in plan.defenses], budgets, plan.seeds, plan.min_asr):
        yield plan.seeds.index(cell.seed), cell


def cells_of(
    subject: Subject,
    defenses: Sequence[str],
    budgets: Sequence[tuple[int, float | None]],
    seeds: Sequence[int],
    min_asr: float = ATTACK_TOOK,
) -> Iterable[CellJob]:
    """Every seed × budget × defense on one network; a budget is (samples of each class, share or None)."""
    for seed in seeds:
        for per_class, share in budgets:
            for defense in defenses:
                yield CellJob(
                    subject=subject, defense=defense, per_class=per_class, share=share, seed=seed, min_asr=min_asr
                )


def suited(defense: str, info: DatasetInfo | None) -> str:
    """The defense's shortest spec, with the data set's augmentation where it augments and does not say how.

    A published setting that goes without augmentation stays without it.
    """
    made = specs.build("defense", defense)
    _, given = specs.parse(defense)
    if info is not None and "augment" not in given and getattr(made, "augment", "none") != "none":
        made = dataclasses.replace(made, augment=info.augmentation)
    return specs.text_of(made, "defense")
