"""Which attacks the default method was developed on, and on which it is judged: fixed before the first trial.

Settings may be chosen with a look at attack success on the victims of ``DEVELOPED_ON`` alone. What is said of the
method is said of ``JUDGED_ON``, whose victims no trial saw.
"""

from __future__ import annotations

#: Kinds of trigger: patch, blend, sinusoid, warp; clean labels, cover samples, a manipulated training.
DEVELOPED_ON = (
    "badnets",
    "blended",
    "sig",
    "wanet",
    "label_consistent",
    "trojannn",
    "tact",
    "adaptive_blend",
    "blind",
)

#: Kinds of trigger: each image its own, spectrum, colours, hidden marks, reflections; clean labels, learned triggers.
JUDGED_ON = (
    "input_aware",
    "ftrojan",
    "ctrl",
    "bpp",
    "low_frequency",
    "ssba",
    "refool",
    "adaptive_patch",
    "narcissus",
    "imc",
)
