"""How the leaderboard says things, in every format alike. The page's script says them in the same way."""

from __future__ import annotations

from decimal import ROUND_HALF_UP, Decimal

from unbackdoor import specs
from unbackdoor.bench.intervals import Estimate
from unbackdoor.bench.jobs import ALL
from unbackdoor.bench.standings import Arena, Row, Victim
from unbackdoor.errors import ConfigError

NOTHING = "–"
NO_DEFENSE = "no defense"
CLEAN = "clean network"
UNKNOWN = "unknown"
ALL_THERE_ARE = "all there are"


def clean(text: str) -> str:
    """One line without control characters, nor those that turn the direction of writing: names come from strangers."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def fixed(value: float, digits: int = 1) -> str:
    """With so many decimals, halves rounded away from zero, as JavaScript's toFixed() does; never "-0.0"."""
    rounded = Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return str(abs(rounded) if rounded.is_zero() else rounded).replace("-", "−")


def percent(found: Estimate | None) -> str:
    """In percent without the sign, with half of the interval: "93.0 ± 0.4"."""
    if found is None:
        return NOTHING
    mean = fixed(100 * found.mean)
    return mean if found.half is None else f"{mean} ± {fixed(100 * found.half)}"


def seconds(found: Estimate | None) -> str:
    if found is None:
        return NOTHING
    return fixed(found.mean, 1 if found.mean < 10 else 0)


def share(value: float) -> str:
    """A share in [0, 1] as "10%", "0.5%"."""
    return f"{100 * value:.4g}%"


def attack(victim: Victim) -> str:
    """The attack with its settings, save for rate and target, which have places of their own."""
    if victim.attack is None:
        return clean(victim.given) if victim.given else CLEAN
    try:
        name, settings = specs.parse(victim.attack)
    except ConfigError:
        return clean(victim.attack)
    rest = ", ".join(f"{k}={v}" for k, v in settings.items() if k not in ("rate", "target"))
    shown = clean(f"{name}({rest})" if rest else name)
    return f"{clean(victim.given)}: {shown}" if victim.given else shown


def attack_name(victim: Victim) -> str:
    """What to filter by: the attack without settings."""
    if victim.attack is None:
        return UNKNOWN if victim.given else CLEAN
    return clean(victim.attack.partition("(")[0])


def victim(who: Victim) -> str:
    """The attack, the rate and the target: "badnets 10% → 0"."""
    rate = "" if who.rate is None else f" {share(who.rate)}"
    target = "" if who.target is None else f" → {who.target}"
    return attack(who) + rate + target


def defense(spec: str | None) -> str:
    return NO_DEFENSE if spec is None else clean(spec)


def place(dataset: str | None, arch: str | None) -> str:
    """Data set and network."""
    return " · ".join(clean(part) for part in (dataset, arch) if part) or "unknown data"


def budget(per_class: int | None, part: float | None) -> str:
    """As the plan said it: "1%", or "10 a class"."""
    if per_class is None:
        return NOTHING
    if per_class == ALL:
        return ALL_THERE_ARE
    return f"{per_class:,} a class" if part is None else share(part)


def each_class(per_class: int) -> str:
    """ "50 clean samples a class"."""
    return "all clean samples there are" if per_class == ALL else f"{per_class:,} clean samples a class"


def arena(where: Arena) -> str:
    """ "cifar10 · preact_resnet18, 1% clean samples (50 a class)"."""
    each = each_class(where.per_class)
    if where.share is not None:
        each = f"{share(where.share)} clean samples ({where.per_class:,} a class)"
    return f"{place(where.dataset, where.arch)}, {each}"


def seeds(row: Row) -> str:
    """How many runs, and on how many networks where they are several: "3", "6 on 2 networks"."""
    if row.defense is None:
        return NOTHING
    return f"{row.done}" if row.networks < 2 else f"{row.done} on {row.networks} networks"


def published(row: Row) -> str:
    """ "ACC / ASR / RA / DER" of a published figure."""
    cell = row.published
    if cell is None:
        return NOTHING
    values = (cell.accuracy, cell.asr, cell.ra, row.published_der)
    return " / ".join(NOTHING if v is None else fixed(100 * v) for v in values)


def why(row: Row) -> str:
    """Why a row has no figures."""
    reasons = [clean(reason) for reason, _ in row.reasons]
    more = f" (and {len(reasons) - 1} other {'reason' if len(reasons) == 2 else 'reasons'})" if len(reasons) > 1 else ""
    return f"{row.status}: {reasons[0] if reasons else 'no reason was recorded'}{more}"
