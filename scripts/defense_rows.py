"""Short specs of every registered defense: what the contract tests and the support matrix run.

A new defense needs one row here. Both runs take moments where the defaults would take hours.
"""

from __future__ import annotations

from dataclasses import dataclass

from unbackdoor import specs
from unbackdoor.types import Defense


@dataclass(frozen=True, kw_only=True)
class Row:
    """How one defense is tried.

    Attributes:
        spec: its spec, with settings that take a moment instead of minutes, of the same code paths.
        idle: a case of the contract tests in which nothing suspicious can be found may come back as it was.
        seedless: draws nothing at random.
        unsupported: names of the contract tests' cases that it refuses with ``UnsupportedModel``; its docstring says
            why.
    """

    spec: str
    idle: bool = False
    seedless: bool = False
    unsupported: frozenset[str] = frozenset()

    def defense(self) -> Defense:
        thing: Defense = specs.build("defense", self.spec)
        return thing


#: What a method that reads BatchNorm's running statistics cannot work on.
WITHOUT_BATCHNORM = frozenset({"no BatchNorm", "vision transformer", "one image a class, two classes, no BatchNorm"})

ROWS: dict[str, Row] = {
    "anp": Row(spec="anp(iterations=6, lr=20, max_loss=0.99)"),
    "auto": Row(spec="auto(candidates=(ft,), planting=40)"),
    "ban": Row(spec="ban(epochs=2, images=0)"),
    "bnp": Row(spec="bnp(max_loss=0.9)", idle=True, seedless=True, unsupported=WITHOUT_BATCHNORM),
    "bti_dbf": Row(spec="bti_dbf(rounds=2, mask_steps=2, generator_steps=2, unlearn_steps=2, width=4)"),
    "clp": Row(spec="clp(u=1)", seedless=True),
    "ep": Row(spec="ep(max_loss=0.9)", idle=True, seedless=True, unsupported=WITHOUT_BATCHNORM),
    "fip": Row(spec="fip(images=40, memory=5.0, memory_images=8)"),
    "fp": Row(spec="fp(epochs=2, step=0.1)"),
    "fst": Row(spec="fst(epochs=2, images=0)"),
    "ft": Row(spec="ft(epochs=2)"),
    "ft_sam": Row(spec="ft_sam(epochs=2)"),
    "ibau": Row(spec="ibau(rounds=1, inner_steps=2, outer_steps=2, solver_steps=2)"),
    "ims": Row(spec="ims(rounds=5, mend_rounds=5, perturb_steps=2, batch_size=8, selectivity=0.1)", idle=True),
    "inoculation": Row(spec="inoculation(lrs=(0.001, 0.002), images=50)"),
    "mcr": Row(spec="mcr(curve_epochs=2, tune_epochs=2)"),
    "nad": Row(spec="nad(epochs=2, teacher_epochs=2)"),
    "nc": Row(spec="nc(rounds=2, round_steps=2, success=0, few_ratio=1, threshold=0.01, epochs=1)"),
    "nft": Row(spec="nft(iterations=4)"),
    "npd": Row(spec="npd(epochs=1, batch_size=20)"),
    "otbr": Row(spec="otbr(shares=(0.1, 0.3), steps=2, batch_size=8)"),
    "pam": Row(spec="pam(rounds=2, mask_steps=2, generator_steps=2, unlearn_steps=2, width=4)"),
    "rnp": Row(spec="rnp(unlearn_epochs=2, recover_epochs=3, recover_lr=300, max_loss=0.99, batch_size=8)"),
    "sau": Row(spec="sau(epochs=1, batch_size=20)"),
    "seam": Row(
        spec="seam(forget_epochs=2, recover_epochs=2, recover_images=0, recover_lrs=(0.001, 0.004), shrinks=(0.5, 1))"
    ),
    "sft": Row(spec="sft(epochs=2, first_epochs=1)"),
    "tsbd": Row(spec="tsbd(shares=(0.1, 0.5), unlearn_epochs=2, epochs=2, images=0)"),
    "ulrl": Row(spec="ulrl(unlearn_epochs=2, relearn_epochs=2, relearn_images=0)"),
}
