"""Generated images and clips as files, for `tessera sample`: one file of each with a grid, or one .npz."""

import hashlib
import json
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from tessera import __version__, clips, generation, images, runtime
from tessera.acceleration import compilation
from tessera.acceleration.first_block_cache import CacheStats
from tessera.bundle import weights_hash
from tessera.cli.launching import Launch
from tessera.cli.options import MAX_SAMPLES, QUOTING, print_error, progress, split_names
from tessera.cli.prompts import Prompt
from tessera.conditioning import LabelField
from tessera.data import AnyData
from tessera.data.clips import read_clip
from tessera.data.folders import VIDEO_SUFFIXES
from tessera.data.images import InvalidSample
from tessera.data.metadata_files import FILE_NAME, METADATA_FILES
from tessera.data.resolve import parse_data
from tessera.errors import TesseraError
from tessera.evaluation.captions import caption_data
from tessera.files import atomic_write
from tessera.generation import SampleRequest, bulk
from tessera.generation.bulk import BulkSamples, bulk_request
from tessera.generation.image_inputs import crop, images_config, read_image, read_mask
from tessera.generation.image_settings import row_settings, trained_fps
from tessera.generation.request import ROUTED
from tessera.interop import load
from tessera.model import Model

FORBIDDEN = re.compile(r'[\x00-\x1f\x7f"*/:<>?\\|%~\ud800-\udfff]')  # in file names, and the marks of `file_stems`
MAX_STEM = 150  # bytes; a file name has at most 255
METADATA = METADATA_FILES[0]
CLIP_SUFFIXES = {*clips.VIDEOS, *clips.ANIMATIONS, *VIDEO_SUFFIXES}
MAX_COLUMNS, MAX_ROWS = 16, 32  # of the grid


def make_request(
    model: Model,
    classes: str | None,
    per_class: int | None,
    seeds: str | None,
    num_samples: int | None,
    policy: bulk.Policy,
    prompts: Sequence[Prompt] = (),
    captions: str | None = None,
    **settings: Any,
) -> SampleRequest:
    """The request of the options: `num_samples` by a class policy, or every class or prompt with every seed."""
    if num_samples is not None:
        return bulk_request(model, num_samples, policy, data=_caption_data(model, captions), **settings)
    if captions is not None:
        raise TesseraError("--captions needs --num-samples: it is the data whose captions are sampled")
    if prompts or model.config.network.uses_text:
        return _prompt_request(model, prompts, classes, per_class, seeds, settings)
    seed_list, labels = parse_seeds(seeds, per_class), parse_classes(classes, model)
    if labels is None:
        return SampleRequest(seed_list, policy="unconditional", **settings)
    condition = {"label": [label for label in labels for _ in seed_list]}
    return SampleRequest(seed_list * len(labels), condition, **settings)


def sample_size(model: Model, size: tuple[int, ...] | None, frames: int | None) -> tuple[int, ...] | None:
    """The size of --size and --frames; None: as trained. Raises TesseraError."""
    if frames is None:
        return size
    if size is not None and len(size) == 3:
        raise TesseraError(f"--size {'x'.join(map(str, size))} has the frames already: leave out --frames")
    trained = generation.image_size(model)
    if len(trained) == 2:
        raise TesseraError("--frames is for clips, and this model makes images: leave it out")
    return frames, *(size or trained[1:])


def _caption_data(model: Model, captions: str | None) -> AnyData | None:
    """The data whose captions a model is sampled for: by default its training data, if its recipe is known."""
    recipe = model.config.recipe or {}
    if captions is None and ("data" not in recipe or not model.config.network.uses_text):
        return None
    return caption_data(captions, captions or parse_data(recipe["data"]), model)


def cut_long_prompts(model: Model, prompts: Sequence[Prompt]) -> None:
    """Let the text encoder cut texts that are too long, and print which."""
    encoder = model.text_encoder
    encoder.cut_long = True
    texts = list(dict.fromkeys(text for each in prompts for text in (each.prompt, each.negative_prompt) if text))
    for text, tokens in zip(texts, encoder.tokenize(texts)):
        if len(tokens) > encoder.max_tokens:
            print_error(f"cut to {encoder.max_tokens} of {len(tokens)} tokens: '{text[:60]} …'")


def _prompt_request(
    model: Model,
    prompts: Sequence[Prompt],
    classes: str | None,
    per_class: int | None,
    seeds: str | None,
    settings: dict[str, Any],
) -> SampleRequest:
    """Every prompt with every seed; one class for each prompt, or one for all, if the model has classes, too."""
    network = model.config.network
    if not network.uses_text:
        hint = "its classes: give --classes instead" if network.num_classes else "nothing: leave --prompt out"
        raise TesseraError(f"this model takes no prompts: it is conditioned on {hint}")
    if not prompts:
        raise TesseraError(
            'this model needs prompts: give --prompt "a red circle", or --prompts FILE with one in each line'
        )
    if classes is not None and not network.num_classes:
        raise TesseraError("this model is conditioned on text, not on classes: leave --classes out")
    seed_list = parse_seeds(seeds, per_class)
    rows = [(each, seed) for each in prompts for seed in ([each.seed] if each.seed is not None else seed_list)]
    condition: dict[str, list[Any]] = {"text": [each.prompt for each, _ in rows]}
    if network.num_classes:
        if classes is None:
            raise TesseraError(
                "this model has classes beside text: give --classes, one for all prompts or one for each"
            )
        labels = parse_classes(classes, model) or []
        if len(labels) not in (1, len(prompts)):
            raise TesseraError(f"{len(prompts)} prompts need as many classes, or one for all; got {len(labels)}")
        by_prompt = dict(zip(map(id, prompts), labels * (len(prompts) if len(labels) == 1 else 1)))
        condition["label"] = [by_prompt[id(each)] for each, _ in rows]
    if any(each.negative_prompt is not None for each in prompts):
        settings = {**settings, "negative": {"text": [each.negative_prompt for each, _ in rows]}}
    if any(each.guidance_scale is not None for each in prompts):
        default = generation.sampling_config(model, **settings.get("settings", {})).guidance_scale
        scales = [default if each.guidance_scale is None else each.guidance_scale for each, _ in rows]
        settings = {**settings, "guidance_scale": scales}
    return SampleRequest([seed for _, seed in rows], condition, **settings)


def parse_seeds(text: str | None, count: int | None) -> list[int]:
    """'0-15' or '1,5,9' -> seeds; None -> 0 .. count - 1. Raises TesseraError."""
    if text is None:
        return list(range(count or 1))
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last) < 2**63):
            raise TesseraError(f"--seeds {text} is not valid: write 0-15 or 1,5,9 (below 2^63)")
        if int(last) - int(first) >= MAX_SAMPLES:
            raise TesseraError(f"--seeds {text} is more than {MAX_SAMPLES:,} images: use several commands")
        seeds += range(int(first), int(last) + 1)
    if count is not None and count != len(seeds):
        raise TesseraError(f"--seeds has {len(seeds)} seeds, but --per-class is {count}: leave one of the two out")
    return seeds


def parse_classes(text: str | None, model: Model, option: str = "--classes") -> list[int] | None:
    """'3,7', 'cat,dog' or 'all' -> labels; None for an unconditional model. Raises TesseraError."""
    num_classes = model.config.network.num_classes
    if not num_classes:
        if text is not None:
            raise TesseraError("this model is unconditional: leave --classes out")
        return None
    if text is None and num_classes > 16:
        raise TesseraError(f"this model has {num_classes} classes: give --classes, for example 0,1,2 or all")
    if text is None or text == "all":
        return list(range(num_classes))
    names = model.class_names
    parts = [part if part in names else part.strip() for part in split_names(option, text)]
    if len(parts) > 1 and text in names:  # one class, whose name has a comma
        if all(part in names for part in parts):
            raise TesseraError(f"{option} {text} is the name of one class and of {len(parts)} classes; {QUOTING}")
        parts = [text]
    try:
        return LabelField().encode(parts, model).tolist()
    except TesseraError as error:
        raise TesseraError(f"{error}; {QUOTING}" if len(parts) > 1 else str(error)) from None


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode(errors="surrogatepass"))


def file_stems(names: Sequence[str]) -> list[str]:
    """A part of a file name for each class: its name, where every system allows it as a file name.

    Other characters are written as in URLs (%2F). The number of the class is added to long names, and to names that are
    equal in upper and lower case.
    """
    stems = [FORBIDDEN.sub(_percent, name) for name in names]
    keys = Counter(unicodedata.normalize("NFC", stem).casefold() for stem in stems)
    result = []
    for label, stem in enumerate(stems):
        unique = keys[unicodedata.normalize("NFC", stem).casefold()] == 1
        short = stem.encode()[:MAX_STEM].decode(errors="ignore")
        result.append(stem if unique and short == stem else f"{short}~{label}")
    return result


def read_inputs(
    model: Model,
    guidance_model: str | None,
    init_image: str | None,
    strength: float | None,
    mask: str | None,
    size: tuple[int, ...] | None,
    controls: Sequence[str] = (),
    control_maps: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """Read --guidance-model, --init-image, --mask and --control: fields of the request, and hashes of the contents.

    Images and mask are read and cropped as training images are, to --size or to the size the model was trained at.
    Raises TesseraError for what does not fit the model.
    """
    arguments: dict[str, Any] = {} if strength is None else {"strength": strength}
    hashes: dict[str, str] = {}
    if guidance_model == ROUTED:
        arguments["guidance_model"] = model.routed
    elif guidance_model is not None:
        try:
            guide = load.load(guidance_model, device=str(model.device))
        except TesseraError as error:
            hint = " (convert a .pt of unusual type to a bundle first)" if Path(guidance_model).is_file() else ""
            raise TesseraError(f"--guidance-model: {error}{hint}") from None
        generation.check_guidance_model(model, guide)
        arguments["guidance_model"], hashes["guidance_model_weights"] = guide, weights_hash(guide.network)
    config = images_config(model)
    height, width = (size or generation.image_size(model))[-2:]
    size = height, width
    for option, specs in (("--control", controls), ("--control-map", control_maps)):
        for spec in specs:
            name, path, how_much = _parse_control(option, spec)
            if name in arguments.setdefault("controls", {}):
                raise TesseraError(f"there are two images for control {name}: give one")
            image = crop(read_image(f"{option} {path}", Path(path), config), size)
            arguments["controls"][name] = generation.ControlInput(image, how_much, option == "--control-map")
            hashes[f"control_{name}_hash"] = pixels_hash(image)
    if init_image is None and (strength is not None or mask is not None):
        raise TesseraError(f"{'--mask' if strength is None else '--strength'} needs --init-image IMAGE")
    if init_image is not None:
        image = read_image(f"--init-image {init_image}", Path(init_image), config)
        arguments["init_image"] = crop(image, size)
        hashes["init_image_hash"] = pixels_hash(arguments["init_image"])
        if mask is not None:
            mask_image = read_mask(f"--mask {mask}", Path(mask))
            if mask_image.shape[:2] != image.shape[:2]:
                raise TesseraError(
                    f"--mask {mask} has {mask_image.shape[0]} x {mask_image.shape[1]} pixels (height x width), but "
                    f"--init-image {init_image} has {image.shape[0]} x {image.shape[1]}: both need the same size"
                )
            arguments["mask"] = crop(mask_image, size)[..., 0] >= 128
            hashes["mask_hash"] = pixels_hash(arguments["mask"])
    return arguments, hashes


def _parse_control(option: str, text: str) -> tuple[str, str, float]:
    """NAME=PATH or NAME=PATH:STRENGTH. Raises TesseraError."""
    match = re.fullmatch(r"([A-Za-z0-9][\w-]*)=(.+?)(?::(-?\d*\.?\d+))?", text)
    if match is None:
        raise TesseraError(
            f"{option} {text} is not valid: write NAME=IMAGE or NAME=IMAGE:STRENGTH, as in edges=a.png:0.8"
        )
    name, path, strength = match.groups()
    return name, path, 1.0 if strength is None else float(strength)


def pixels_hash(pixels: np.ndarray) -> str:
    """A hash of the contents of images."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def compile_network(model: Model) -> None:
    """Compile the network of a model. If that fails, print the reason and continue without."""
    _, reason = compilation.compile_network(model.network, "blocks", dynamic_shapes=True)
    if reason is not None:
        print_error(f"continuing without compilation: {reason}")


def write_npz(
    model: Model,
    request: SampleRequest,
    target: Path,
    batch_size: int,
    description: str,
    part: tuple[int, int] | None = None,
    launched: Launch | None = None,
) -> None:
    """Generate shards beside the target, shared by all processes, and join them into one .npz.

    part: generate only these shards: number from 0, and of how many. launched: tasks generate the shards.
    """
    if target.suffix != ".npz":
        raise TesseraError(f"--npz {target} must end in .npz")
    if target.exists():
        raise TesseraError(f"{target} exists already: remove it or give another name")
    folder = target.with_name(target.name + ".shards")
    logs = target.with_name(target.name + ".launch")
    if launched is not None:
        request.check(model)
        launched.run(logs)
    with runtime.distributed_session() as ranks, progress() as start:
        samples = BulkSamples(model, request, folder, batch_size, description)
        report = start(f"generating {samples.count}") if ranks.is_main else None
        bulk.generate_shards(samples, ranks, report, part or (0, 1))
        if ranks.is_main and part is None:
            bulk.write_npz(samples, target)
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(logs, ignore_errors=True)
    if part is not None:
        print(f"shard {part[0] + 1}/{part[1]} is done; when all are done, run the command without --shard")
    elif ranks.is_main:
        print(f"{samples.count} images in {target}")


@dataclass(frozen=True)
class ClipFormat:
    """How clips are written. suffix: of the files in a folder; "": a folder of PNGs each."""

    fps: float
    suffix: str = ".webp"

    @classmethod
    def of(cls, model: Model, request: SampleRequest, out: Path, fps: float | None, name: str | None) -> Self | None:
        """The format of the options --fps and --format; None for a model or a size of images. Raises TesseraError."""
        if len(request.size or generation.image_size(model)) == 2:
            if fps is not None or name is not None:
                raise TesseraError("--fps and --format are for clips, and this model makes images: leave them out")
            if out.suffix.lower() in CLIP_SUFFIXES - {".png"}:
                raise TesseraError(f"--out {out} is for a clip: give a folder, or a .png for the grid of images alone")
            return None
        is_file = out.suffix.lower() in CLIP_SUFFIXES
        if name is not None and is_file:
            raise TesseraError(f"--format is for a folder of clips, and --out is the file {out}: leave one out")
        suffix = out.suffix.lower() if is_file else {None: ".webp", "frames": ""}.get(name, f".{name}")
        fps = trained_fps(model) if fps is None else fps
        clips.check_target(Path("clip" + suffix), fps)
        return cls(fps, suffix)

    def read(self, path: Path, settings: dict[str, Any], size: tuple[int, ...], channels: int) -> np.ndarray | None:
        """uint8 [T, H, W, C] of a file with exactly these settings and this size, None without one."""
        if not clips.holds(path, settings):
            return None
        try:
            clip = read_clip(path, self.fps, channels)
        except InvalidSample:
            return None
        clip = clip[tuple(map(slice, size))]  # a video has even sides
        return clip if clip.shape[:3] == tuple(size) else None  # an animation of equal frames is one image


def write_images(
    model: Model,
    request: SampleRequest,
    out: Path,
    batch_size: int,
    settings: dict[str, Any],
    clip_format: ClipFormat | None = None,
) -> None:
    """Write a file of each image or clip and a grid into a folder, or the grid alone into one file.

    Images are PNGs. One clip in one file is written as it is, without a grid. An existing file with the same settings
    is not generated again. settings: stored in every file. The folder also gets a metadata.jsonl with classes and
    prompts, so that it is a data set of its images.
    """
    sampling = request.check(model).model_dump(mode="json")
    settings = {**settings, "tessera": __version__, "sampling": sampling, "weights": weights_hash(model.network)}
    settings |= {} if clip_format is None else {"fps": clip_format.fps}
    single_files = {".png"} if clip_format is None else CLIP_SUFFIXES
    grid_only, count = out.suffix.lower() in single_files, len(request.seeds)
    if grid_only and count > MAX_COLUMNS * MAX_ROWS:
        raise TesseraError(
            f"a grid holds at most {MAX_COLUMNS * MAX_ROWS} images, not {count}: give a folder for --out"
        )
    stats, sheet, metadata = CacheStats(), [], {}
    with progress() as start:
        report = start(f"generating {count}")
        for first in range(0, count, batch_size):
            rows = range(first, min(first + batch_size, count))
            folder = None if grid_only else out
            batch = _generate(model, request, stats, rows, folder, settings, metadata, clip_format)
            sheet += batch[: MAX_COLUMNS * MAX_ROWS - len(sheet)]
            report(rows.stop, count)
    all_settings = row_settings(model, request, range(count))
    seeds, groups = all_settings["seeds"], all_settings["prompts"] or all_settings["classes"]
    row_per_group = groups is not None and len(seeds) * len(groups) == count and len(seeds) <= MAX_COLUMNS
    columns, zoom = len(seeds) if row_per_group else min(count, 8), max(1, 64 // sheet[0].shape[-3])
    prompts = all_settings["prompts"] if row_per_group else None
    settings |= all_settings
    if clip_format is None or out.suffix.lower() == ".png":
        columns = columns if clip_format is None else 1  # of clips, each row is a row of frames
        grid_path = out if grid_only else out / "grid.png"
        images.save_png(grid_path, _grid(np.stack(sheet), columns, prompts, zoom), settings)
    else:
        grid_path = out if grid_only else out / "grid.webp"
        frames = np.stack(sheet).swapaxes(0, 1)
        one = grid_only and count == 1
        grid = sheet[0] if one else np.stack([_grid(frame, columns, prompts, zoom) for frame in frames])
        clips.save_clip(grid_path, grid, clip_format.fps, settings)
    if not grid_only:
        _write_metadata(out / METADATA, metadata)
    caching = f"; caching computed {stats.computed / stats.requested:.0%} of the blocks" if stats.requested else ""
    what = "images" if clip_format is None else "clips"
    print((str(out) if grid_only else f"{count} {what} and {grid_path.name} in {out}") + caching)


def _grid(samples: np.ndarray, columns: int, prompts: Sequence[str] | None, zoom: int) -> np.ndarray:
    """Images or clips in a grid, with a prompt above each row if there are any."""
    if prompts is None:
        return images.grid(samples, columns, zoom=zoom)
    parts = np.split(samples, len(prompts))
    return images.with_captions([images.grid(part, columns, zoom=zoom) for part in parts], prompts)


def _write_metadata(path: Path, metadata: dict[str, dict[str, str]]) -> None:
    """Add the class and prompt of images, by file name, to a metadata.jsonl."""
    rows = {}
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        with suppress(ValueError, TypeError, KeyError):  # not ours: it is replaced
            rows = {row[FILE_NAME]: row for row in map(json.loads, lines) if (path.parent / row[FILE_NAME]).exists()}
    rows |= {name: {FILE_NAME: name, **fields} for name, fields in metadata.items()}
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))


def prompt_stems(prompts: Sequence[str]) -> list[str]:
    """A part of a file name for each prompt: its words, joined by `-`, and its number where they are long or equal."""
    return [stem[:MAX_STEM] for stem in file_stems(["-".join(prompt.split()) or "empty" for prompt in prompts])]


def _generate(
    model: Model,
    request: SampleRequest,
    cache_stats: CacheStats,
    rows: range,
    out: Path | None,
    settings: dict[str, Any],
    metadata: dict[str, dict[str, str]],
    clip_format: ClipFormat | None = None,
) -> list[np.ndarray]:
    """The images or clips of some rows of a request: read from the folder where they exist, else generated and written.

    metadata: their class and prompt by file name, which are added.
    """
    done: dict[int, np.ndarray] = {}
    files = {}
    stems, prompts = file_stems(model.class_names), list(dict.fromkeys(request.prompts or ()))
    prompt_names = dict(zip(prompts, prompt_stems(prompts)))
    for row in rows:
        one_settings, prefix = row_settings(model, request, [row]), ""
        if one_settings["prompts"] is not None:
            prefix = f"{prompt_names[one_settings['prompts'][0]]}-"
        if one_settings["classes"] is not None:
            prefix += f"class-{stems[one_settings['classes'][0]]}-"
        suffix = ".png" if clip_format is None else clip_format.suffix
        files[row] = f"{prefix}seed-{request.seeds[row]}{suffix}", {**settings, **one_settings}
        names, prompt = one_settings["class_names"], one_settings["prompts"]
        fields = {"label": names and names[0], "caption": prompt and prompt[0]}
        metadata[files[row][0]] = {name: value for name, value in fields.items() if value is not None}
        if out is None:
            continue
        path, stored = out / files[row][0], files[row][1]
        if clip_format is None:
            image = images.load_png(path, stored)
        else:
            size = request.size or generation.image_size(model)
            image = clip_format.read(path, stored, size, model.codec.pixel_channels)
        if image is not None:
            done[row] = image
    missing = [row for row in rows if row not in done]
    if missing:
        generated = generation.generate_request(
            model, request.select(missing), batch_size=len(missing), cache_stats=cache_stats
        )
        for row, image in zip(missing, generated):
            done[row] = image
            if out is None:
                continue
            path, stored = out / files[row][0], files[row][1]
            if clip_format is None:
                images.save_png(path, image, stored)
                continue
            if path.is_dir():  # of other settings
                shutil.rmtree(path)
            clips.save_clip(path, image, clip_format.fps, stored)
    return [done[row] for row in rows]
