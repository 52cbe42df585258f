"""How fast each attack's trigger stamps CIFAR-sized images, beside code that does it image by image.

The other code is what most attacks in the field run while they make their poisoned sets: for each image, NumPy, SciPy
or Pillow on its (height, width, channels) bytes. What does not depend on the image (a pattern, a sinusoid) it keeps
between images too. Both start from the same bytes in memory and end with float32 images in [0, 1], as a network takes
them. Before anything is timed they are compared: what differs must be what the other way rounds. What a trigger learns
is made up here, since its time does not depend on the values. A trigger that is a network is run by the other way on
one image at a time, as a data set's transform does; the adaptive attacks stamp their base's trigger, which is checked
and not timed again.

The aim is a second for 10,000 images on one core. A network can miss it, and has a floor: the time that as many
multiplications and additions take in a bare convolution of 32 channels by 32 over 16×16 places, 128 images at a time,
channels last, which is about as fast as a processor convolves. The table's last column has both. An image takes SSBA's
encoder 8.0 million operations, LIRA's U-Net 4.6 million, Input-Aware's two 8.8 million. LIRA takes about a second and
Input-Aware about two. Both stay well above their floor: nearly half of a U-Net's operations are at full resolution,
where 3 and 8 channels fill half of a processor's lanes or less, and what a bare convolution does without
(normalisation, enlarging, tanh) is a third of its time or more.

    python benchmarks/trigger_speed.py                           # 10,000 images of noise
    python benchmarks/trigger_speed.py --data DIR                # the images of cifar10.npz
    python benchmarks/trigger_speed.py --images 200 --repeats 1  # a quick look
    python benchmarks/trigger_speed.py --out benchmarks/records/trigger_speed.json  # also write every single figure
    python benchmarks/trigger_speed.py --write docs/attacks.md   # the committed record's table into a page

One thread, and its processor time. The two take turns, the one that begins changing from round to round; a round's
ratio is the other's time per image over ours. The per-image code runs on as many of the images as it manages in
``--seconds``. Shown are medians over the rounds, and the ratio's lowest and highest. Figures mean something only on a
machine that does nothing else meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from unbackdoor import specs
from unbackdoor.attacks.adaptive.base import Adaptive
from unbackdoor.attacks.image import adaptive_patch
from unbackdoor.attacks.image.blended import Blended
from unbackdoor.attacks.image.sleeper_agent import SleeperAgent
from unbackdoor.attacks.image.ssba import SSBA, Encoder
from unbackdoor.attacks.joint import UNet, packed
from unbackdoor.attacks.poisoning import Contamination
from unbackdoor.data.named import load_dataset
from unbackdoor.files import write
from unbackdoor.rng import Rng, isolated
from unbackdoor.types import Trigger, as_float
from victim_runs import show

#: Images stamped at a time, as :func:`unbackdoor.inference.predict` has them.
BATCH = 500
SIDE = 32

Bytes = NDArray[np.uint8]
Floats = NDArray[Any]
#: One image, (height, width, 3) bytes, to its stamped self on 0..255.
PerImage = Callable[[Bytes], Floats]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trigger and the other way to it.

    Attributes:
        spec: the attack.
        other: makes the per-image function of the attack; what it can keep between images it works out here.
        state: makes up what the trigger learns.
        tolerance: by how much both may differ at most, on 0..255: what the other way rounds.
    """

    spec: str
    other: Callable[[Contamination], PerImage]
    state: Callable[[], Mapping[str, Tensor]] = dict
    tolerance: float = 0.01

    def attack(self) -> Contamination:
        """With what it learned."""
        made: Contamination = specs.build("attack", self.spec)
        return made.with_state(self.state())


# What triggers learn


def noise(*shape: int) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, generator=Rng(0).stream("state"))


def patch_state(side: int) -> dict[str, Tensor]:
    """A patch of whole bytes, so that Pillow has the same one."""
    return {"patch": noise(3, side, side).mul(255).round() / 255}


def pattern_state() -> dict[str, Tensor]:
    return {"pattern": (2 * noise(3, SIDE, SIDE) - 1) * 16 / 255}


def refool_state() -> dict[str, Tensor]:
    """Six reflections, two of each kind."""
    return {
        "pictures": noise(6, 3, SIDE, SIDE),
        "kinds": torch.arange(6) % 3,
        "strengths": torch.linspace(0.2, 0.45, 6),
        "sigmas": torch.linspace(1.0, 2.6, 6),
        "shifts": torch.tensor([[2, 3], [3, 2], [2, 4], [4, 2], [3, 4], [4, 4]]),
        "first": torch.linspace(0.15, 0.85, 6),
    }


def ssba_state() -> dict[str, Tensor]:
    attack = SSBA()
    with isolated(Rng(0).child("encoder")):
        encoder = Encoder(3, attack.bits, attack.bound)
    code = noise(attack.bits).round()
    return {"code": code, **{f"encoder.{name}": value for name, value in encoder.state_dict().items()}}


def generator_state(**outputs: int) -> Mapping[str, Tensor]:
    """A network of random weights under each name, with so many output channels."""
    with isolated(Rng(0).child("generators")):
        return packed(**{name: UNet(3, count, 8) for name, count in outputs.items()})


# The other way


def pasted(attack: Contamination, side: int) -> PerImage:
    """Pillow's: a square of ``side`` pixels, bottom right, white unless the attack learned or drew another."""
    patch = Image.new("RGB", (side, side), (255, 255, 255))
    if "patch" in attack.state:
        patch = picture_of(attack.state["patch"])
    elif isinstance(attack, SleeperAgent):
        patch = picture_of(attack.patch(3, SIDE, SIDE))

    def stamp(pixels: Bytes) -> Floats:
        image = Image.fromarray(pixels)
        image.paste(patch, (SIDE - side, SIDE - side))
        return np.asarray(image)

    return stamp


def picture_of(values: Tensor) -> Image.Image:
    """(C, H, W) in [0, 1] as Pillow has it, in bytes."""
    return Image.fromarray(values.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy())


def blended(_: Contamination) -> PerImage:
    picture = picture_of(Blended().picture(3, SIDE, SIDE))

    def stamp(pixels: Bytes) -> Floats:
        return np.asarray(Image.blend(Image.fromarray(pixels), picture, 0.2))

    return stamp


def checkers(_: Contamination) -> PerImage:
    """Label-Consistent's: white where row and column are both odd or both even, in each corner."""
    cells = np.zeros((3, 3, 3), np.uint8)
    cells[::2, ::2] = cells[1, 1] = 255
    patch = Image.fromarray(cells)

    def stamp(pixels: Bytes) -> Floats:
        image = Image.fromarray(pixels)
        for place in ((0, 0), (0, SIDE - 3), (SIDE - 3, 0), (SIDE - 3, SIDE - 3)):
            image.paste(patch, place)
        return np.asarray(image)

    return stamp


def logos(_: Contamination) -> PerImage:
    """Adaptive-Patch's two at test time: Pillow pastes each through its mask."""
    drawn = adaptive_patch.draw(SIDE // 4)
    (disc, red), (whole, checks) = drawn[0], drawn[2]
    masks = [Image.fromarray(mask.mul(255).to(torch.uint8).numpy()) for mask in (disc, whole)]
    patches, low = [picture_of(colour) for colour in (red, checks)], SIDE - SIDE // 4

    def stamp(pixels: Bytes) -> Floats:
        image = Image.fromarray(pixels)
        image.paste(patches[0], (low, low), masks[0])
        image.paste(patches[1], (low, 0), masks[1])
        return np.asarray(image)

    return stamp


def pattern(factor: float) -> Callable[[Contamination], PerImage]:
    """NumPy's: the learned pattern, this many times, added."""

    def made(attack: Contamination) -> PerImage:
        added: Floats = attack.state["pattern"].mul(255 * factor).permute(1, 2, 0).contiguous().numpy()

        def stamp(pixels: Bytes) -> Floats:
            stamped: Floats = np.clip(pixels.astype(np.float32) + added, 0, 255)
            return stamped

        return stamp

    return made


def warped(attack: Contamination) -> PerImage:
    """SciPy's: each channel read along the field, linearly."""
    field = F.interpolate(attack.state["field"], (SIDE, SIDE), mode="bicubic", align_corners=True)[0].double().numpy()
    across, down = field * 0.5 / SIDE * (SIDE - 1) / 2
    rows, columns = np.mgrid[:SIDE, :SIDE]
    places = np.stack([rows + down, columns + across]).clip(0, SIDE - 1)

    def stamp(pixels: Bytes) -> Floats:
        channels = [ndimage.map_coordinates(pixels[..., c], places, np.float32, order=1) for c in range(3)]
        return np.stack(channels, 2)

    return stamp


def reflected(attack: Contamination) -> PerImage:
    """Refool's, in NumPy; the reflections do not depend on the image and are kept."""
    state = {name: value.double().numpy() for name, value in attack.state.items()}
    layers = [reflection(state, index) for index in range(len(state["kinds"]))]
    bell = np.exp(-(np.linspace(-3, 3, SIDE) ** 2) / 4)
    seen = (bell[:, None] * bell)[..., None]

    def stamp(pixels: Bytes) -> Floats:
        index = int(pixels.sum()) % len(layers)
        light, strength, layer = (pixels / 255) ** 2.2, state["strengths"][index], layers[index]
        if state["kinds"][index] != 1:
            mixed = (1 - strength) * light + strength * layer
        else:
            total = layer + light
            over = total > 1
            mean = (total * over).sum((0, 1)) / over.sum((0, 1)).clip(1)
            layer = (layer - 1.13 * (mean.clip(1) - 1)).clip(0, 1)
            mixed = (1 - strength) * light + (1 + strength) / 2 * seen * layer
        stamped: Floats = mixed.clip(1e-8, 1) ** (1 / 2.2) * 255
        return stamped

    return stamp


def reflection(state: Mapping[str, Floats], index: int) -> Floats:
    """(H, W, 3): a picture in linear light, as it is (kind 0), blurred (1) or doubled (2)."""
    light: Floats = state["pictures"][index].transpose(1, 2, 0) ** 2.2
    if state["kinds"][index] == 1:
        reach = math.ceil(2 * state["sigmas"][index])
        for axis in (0, 1):
            light = ndimage.gaussian_filter1d(light, state["sigmas"][index], axis, mode="nearest", radius=reach)
    elif state["kinds"][index] == 2:
        down, right = (int(n) for n in state["shifts"][index])
        first = state["first"][index]
        both = first * light[down:, right:] + (1 - first) * light[: SIDE - down, : SIDE - right]
        rows, columns = ((np.arange(SIDE) + 0.5) * n / SIDE - 0.5 for n in both.shape[:2])
        places = np.meshgrid(rows, columns, indexing="ij")
        light = np.stack([ndimage.map_coordinates(both[..., c], places, order=1, mode="nearest") for c in range(3)], 2)
    return light


def by_network(change: Callable[[Tensor], Tensor]) -> PerImage:
    """As a data set's transform has it: one image is made a tensor, and goes through the network alone."""

    def stamp(pixels: Bytes) -> Floats:
        with torch.no_grad():
            made = change(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)
        stamped: Floats = made[0].mul(255).permute(1, 2, 0).numpy()
        return stamped

    return stamp


def encoded(attack: Contamination) -> PerImage:
    assert isinstance(attack, SSBA)
    encoder = Encoder(3, attack.bits, attack.bound)
    names = [name for name in attack.state if name.startswith("encoder.")]
    encoder.load_state_dict({name.removeprefix("encoder."): attack.state[name] for name in names})
    return by_network(lambda x: encoder(x, attack.state["code"][None]))


def masked(attack: Contamination) -> PerImage:
    """Input-Aware's."""
    generator, mask = networks(attack, "generator", "mask")

    def change(x: Tensor) -> Tensor:
        share = torch.tanh(20 * mask(x).sigmoid() - 10) / 2 + 0.5
        made: Tensor = x + share * (generator(x).sigmoid() - x)
        return made

    return by_network(change)


def bounded(attack: Contamination) -> PerImage:
    """LIRA's."""
    (generator,) = networks(attack, "generator")
    return by_network(lambda x: (x + 0.01 * generator(x).tanh()).clamp(0, 1))


def networks(attack: Contamination, *names: str) -> list[nn.Module]:
    return [UNet.kept(attack, name, torch.device("cpu")) for name in names]


def sig(_: Contamination) -> PerImage:
    wave = 40 * np.sin(2 * np.pi * 6 * np.arange(SIDE) / SIDE)[None, :, None]

    def stamp(pixels: Bytes) -> Floats:
        stamped: Floats = np.clip(pixels.astype(np.float32) + wave, 0, 255)
        return stamped

    return stamp


def frequency(to_colour: Floats, magnitude: float) -> Callable[[Contamination], PerImage]:
    """To a colour space, DCT of its second and third channel, add, and all the way back."""
    to_rgb: Floats = np.linalg.inv(to_colour)

    def stamp(pixels: Bytes) -> Floats:
        colours = pixels.astype(np.float64) @ to_colour.T
        for channel in (1, 2):
            coefficients = scipy.fft.dctn(colours[..., channel], norm="ortho")
            coefficients[15, 15] += magnitude
            coefficients[31, 31] += magnitude
            colours[..., channel] = scipy.fft.idctn(coefficients, norm="ortho")
        return np.clip(colours @ to_rgb.T, 0, 255)

    return lambda _: stamp


def weighted(red: float, blue: float, *, swapped: bool) -> Floats:
    """RGB to luminance and two scaled differences to it: blue's first, or red's where ``swapped``."""
    luminance = np.array([0.299, 0.587, 0.114])
    of_red, of_blue = (np.eye(3)[0] - luminance) * red, (np.eye(3)[2] - luminance) * blue
    return np.array([luminance, of_red, of_blue] if swapped else [luminance, of_blue, of_red])


def bpp(_: Contamination) -> PerImage:
    def stamp(pixels: Bytes) -> Floats:
        return np.round(pixels / 255 * 7) / 7 * 255

    return stamp


def bpp_dithered(_: Contamination) -> PerImage:
    """Pixel after pixel, the three channels at once: what remains without a compiler."""

    def stamp(pixels: Bytes) -> Floats:
        work = np.zeros((SIDE + 1, SIDE + 2, 3))
        work[:SIDE, 1:-1] = pixels / 255 * 7
        for row in range(SIDE):
            for column in range(1, SIDE + 1):
                old = work[row, column]
                new = np.round(old)
                error = old - new
                work[row, column] = new
                work[row, column + 1] += error * (7 / 16)
                work[row + 1, column - 1] += error * (3 / 16)
                work[row + 1, column] += error * (5 / 16)
                work[row + 1, column + 1] += error * (1 / 16)
        return work[:SIDE, 1:-1].clip(0, 7) / 7 * 255

    return stamp


CASES = (
    Case(spec="badnets", other=lambda attack: pasted(attack, 3)),
    Case(spec="blended", other=blended, tolerance=1.2),  # Pillow cuts to bytes, of a picture that is bytes
    Case(spec="sig", other=sig),
    Case(spec="ctrl", other=frequency(weighted(0.877, 0.492, swapped=False), 100)),
    Case(spec="ftrojan", other=frequency(weighted(1 / 1.402, 1 / 1.772, swapped=True), 30)),
    Case(spec="bpp", other=bpp),
    # A value that float32 and float64 round to different levels takes its neighbours along.
    Case(spec="bpp(dithering=true)", other=bpp_dithered, tolerance=math.inf),
    Case(spec="low_frequency", other=pattern(1), state=pattern_state),
    Case(spec="narcissus", other=pattern(3), state=pattern_state),
    Case(spec="trojannn", other=lambda attack: pasted(attack, 8), state=lambda: patch_state(8)),
    Case(spec="imc", other=lambda attack: pasted(attack, 3), state=lambda: patch_state(3)),
    Case(spec="sleeper_agent", other=lambda attack: pasted(attack, 8)),
    Case(spec="tact", other=lambda attack: pasted(attack, 4)),
    Case(spec="blind", other=lambda attack: pasted(attack, 3)),
    Case(spec="label_consistent", other=checkers),
    Case(spec="adaptive_blend", other=blended, tolerance=1.2),
    Case(spec="adaptive_patch", other=logos, tolerance=0.6),  # colours that are no whole bytes
    Case(spec="refool", other=reflected, state=refool_state, tolerance=0.1),  # float32 powers of what is nearly black
    Case(spec="wanet", other=warped, state=lambda: {"field": (2 * noise(1, 2, 4, 4) - 1) * 2}),
    Case(spec="ssba", other=encoded, state=ssba_state),
    Case(spec="input_aware", other=masked, state=lambda: generator_state(generator=3, mask=1)),
    Case(spec="lira", other=bounded, state=lambda: generator_state(generator=3)),
)


def stamping_their_base() -> list[str]:
    """The registered attacks that say how a network is trained, and stamp what another attack stamps."""
    return [name for name in specs.names("attack") if issubclass(specs.lookup("attack", name), Adaptive)]


def check_base(name: str, images: Tensor) -> str:
    """The table's line for such an attack, which must stamp bit for bit what its base does.

    Raises:
        SystemExit: it does not.
    """
    for base in ("badnets", "blended"):
        attack = specs.build("attack", f'{name}(base="{base}")')
        if not torch.equal(ours(attack.trigger, images), ours(specs.build("attack", base).trigger, images)):
            raise SystemExit(f"{name} should stamp what its base {base} stamps, and does not")
    return f"| `{name}` | as its base | as its base | 1× | – |"


# Timing


def ours(trigger: Trigger, images: Tensor) -> Tensor:
    return torch.cat([trigger(as_float(part)) for part in torch.split(images, BATCH)])


def theirs(stamp: PerImage, images: Bytes) -> Tensor:
    """As a data set would: one image at a time, each made a tensor of its own."""
    made = [torch.from_numpy(np.ascontiguousarray(stamp(i).transpose(2, 0, 1), np.float32)).div(255) for i in images]
    return torch.stack(made)


def seconds_of(run: Callable[[], Tensor]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def check(case: Case, trigger: Trigger, stamp: PerImage, images: Tensor, arrays: Bytes) -> float:
    """The largest difference on 0..255 over a few images.

    Raises:
        SystemExit: they do not do the same.
    """
    few = min(8, len(images))
    apart = (ours(trigger, images[:few]) - theirs(stamp, arrays[:few])).abs().mul(255)
    differing = (apart > 1).double().mean().item()
    if apart.max().item() > case.tolerance or (math.isinf(case.tolerance) and differing > 0.01):
        raise SystemExit(
            f"{case.spec}: both ways should do the same, and differ by up to {apart.max().item():.3g} of 255 levels"
        )
    return apart.max().item()


def compare(case: Case, images: Tensor, seconds: float, repeats: int) -> dict[str, Any]:
    """Times (s, one a round), the images that each was timed on, and the ratios of the times per image."""
    attack = case.attack()
    trigger, stamp = attack.trigger, case.other(attack)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    difference = check(case, trigger, stamp, images, arrays)
    ours(trigger, images)  # unmeasured: memory fetched, kernels chosen
    few = min(20, len(arrays))
    theirs(stamp, arrays[:few])
    per_image = seconds_of(lambda: theirs(stamp, arrays[:few])) / few
    count = max(1, min(len(arrays), round(seconds / per_image)))
    operations = operations_of(trigger)
    turns = {"ours": lambda: ours(trigger, images), "other": lambda: theirs(stamp, arrays[:count])}
    times: dict[str, list[float]] = {"ours": [], "other": []}
    for index in range(repeats):
        for name in sorted(turns, reverse=index % 2 == 1):
            times[name].append(seconds_of(turns[name]))
    floors = [seconds_of_convolutions(operations) * len(images) for _ in range(repeats if operations else 0)]
    ratios = [(b / count) / (a / len(images)) for a, b in zip(times["ours"], times["other"], strict=True)]
    return {
        "images": {"ours": len(images), "other": count},
        "difference": difference,
        "seconds": times,
        "ratio": ratios,
        "operations": operations,
        "floor_seconds": floors,
    }


def operations_of(trigger: Trigger) -> int:
    """Multiplications and additions that one more image costs in convolutions and matrix products."""
    counts = []
    for images in (1, 2):
        with FlopCounterMode(display=False) as counter:
            trigger(torch.full((images, 3, SIDE, SIDE), 0.5))
        counts.append(counter.get_total_flops())
    return int(counts[1] - counts[0])


def seconds_of_convolutions(operations: int) -> float:
    """What so many operations take in a bare convolution that suits the processor."""
    weight = torch.ones(32, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    x = torch.ones(128, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    times = [seconds_of(lambda: F.conv2d(x, weight, padding=1)) for _ in range(11)]
    return statistics.median(times[1:]) * operations / (2 * weight.numel() * 16 * 16 * len(x))


def head(images: int) -> str:
    return (
        f"| attack | seconds for {images:,} images | image by image | ratio | floor, in seconds |\n"
        "|---|---:|---:|---:|---:|"
    )


def tables(records: Path) -> dict[str, str]:
    """The committed record as a table."""
    record = json.loads((records / "trigger_speed.json").read_text())
    lines = [row(spec, result, record["images"]) for spec, result in record["attacks"].items()]
    return {"trigger-speed": "\n".join([head(record["images"]), *lines])}


def row(spec: str, result: dict[str, Any], images: int) -> str:
    """One line of the table, both times for as many images."""
    used, times, ratios = result["images"], result["seconds"], result["ratio"]
    mine, other = (statistics.median(times[name]) * images / used[name] for name in ("ours", "other"))
    spread = f"{statistics.median(ratios):,.0f}× ({min(ratios):,.0f} to {max(ratios):,.0f})"
    floor = "–"
    if result["operations"]:
        floor = (
            f"{statistics.median(result['floor_seconds']):.2f} ({result['operations'] / 1e6:.1f} M operations an image)"
        )
    return f"| `{spec}` | {mine:.3f} | {other:.2f} | {spread} | {floor} |"


def images_for(count: int, root: Path | None) -> Tensor:
    """(count, 3, 32, 32) uint8."""
    if root is None:
        generator = Rng(0).stream("synthetic")
        return torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    return load_dataset("cifar10", "train", root).inputs[:count].contiguous()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, help="folder with cifar10.npz; noise without")
    parser.add_argument("--images", type=int, default=10_000, help="how many images (default 10,000)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of the other way's turn, at most (default 4)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--attack", choices=[c.spec for c in CASES], action="append", help="only this; can be repeated")
    parser.add_argument("--out", type=Path, help="also write every single figure here, as JSON")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="time nothing, put the record's table into a page")
    given = parser.parse_args(arguments)
    if given.write is not None:
        show(tables(Path(__file__).parent / "records"), given.write)
        return
    if given.images < 1 or given.seconds <= 0 or given.repeats < 1:
        parser.error("--images and --repeats must be at least 1, --seconds above 0")
    torch.set_num_threads(1)
    images = images_for(given.images, given.data)
    about = {
        "images": len(images),
        "threads": 1,
        "batch_size": BATCH,
        "data": "noise" if given.data is None else "cifar10",
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"\n{head(len(images))}")
    results = {}
    for case in CASES:
        if given.attack is None or case.spec in given.attack:
            results[case.spec] = compare(case, images, given.seconds, given.repeats)
            print(row(case.spec, results[case.spec], len(images)), flush=True)
            if given.out is not None:
                text = json.dumps({**about, "attacks": results}, indent=2, ensure_ascii=False)
                write(given.out, f"{text}\n".encode(), force=True)
    if given.attack is None:
        for name in stamping_their_base():
            print(check_base(name, images[:8]))


if __name__ == "__main__":
    main(sys.argv[1:])
