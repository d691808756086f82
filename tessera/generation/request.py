"""A request for images or clips: which rows are sampled with which condition, seed, size, solver and guidance.

Shapes: B rows, K terms of guidance, T frames, H W height and width, C channels of the pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tessera.acceleration.first_block_cache import check_caching
from tessera.conditioning import Condition, check_inputs
from tessera.errors import TesseraError
from tessera.generation.control import ControlInput, encode_controls
from tessera.model import Model
from tessera.models import NetworkConfig
from tessera.rows import Rows
from tessera.runtime import Precision
from tessera.sampling import Pyramid, SamplingConfig, Together, check_schedule, check_step_size
from tessera.settings import apply_overrides, validate

# The settings of a diffusion process that decide what a raw output means; the others are of training alone.
OUTPUT_SETTINGS = {
    "kind", "num_timesteps", "schedule", "prediction", "variance", "zero_terminal_snr", "path", "network_times",
}  # fmt: skip
ROUTED = "routed"  # as a guidance model: the model itself, with tokens that skip blocks (`Model.routed`)
FRAMES = "frames"  # the term whose weak output has noise in place of clean frames
ALL = "all"  # the term of guidance whose weak output lacks every condition


@dataclass(frozen=True)
class SampleRequest:
    """What to sample. Whatever varies between rows is a sequence, with one entry for each row or one for all rows.

    seeds: each determines its image, independent of the batch. condition: inputs by field of the model's condition,
    such as {"label": [3, "cat"]} or {"text": ["a red circle"]}. negative: inputs that replace the null values of the
    fields in the weak output of guidance, such as negative prompts; a row whose negative text is None keeps the null
    value. guidance_scale: instead of that of the settings; one number, or one per row. size: of the image in pixels,
    (H, W), (T, H, W) or one number for a square (default: the trained size). settings: any key of SamplingConfig, and
    `overrides`. guidance_model: a weaker model with the same condition, instead of the model itself without condition
    (autoguidance).

    init_image: uint8 [B, H, W, C], or [H, W, C] for all rows, to begin from: noise is added up to the nearest time of
    the grid below strength (default 0.6; with a mask 1, which begins in noise alone). The size is that of the image.
    mask: [B, H, W] or [H, W], 1 where to generate and 0 where the image stays. Clips have T before H.

    given_frames: uint8 [B, F, H, W, C], or [F, H, W, C] for all rows: frames of the clips, whose numbers are
    given_indices (-1 is the last frame). They stay as they are, and the other frames are sampled to go with them.

    policy: how the inputs were chosen, for the record. cut_long: prompts of more tokens than the text encoder takes are
    cut, as captions are in training, instead of an error. controls: images for the controls that are attached to the
    model, by name, as `ControlInput` or as its images alone.
    """

    seeds: Sequence[int] = (0,)
    condition: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    guidance_scale: float | Sequence[float] | Tensor | None = None
    size: tuple[int, ...] | None = None  # a number becomes a square
    init_image: np.ndarray | None = None
    strength: float | None = None
    mask: np.ndarray | None = None
    precision: Precision = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    guidance_model: Model | None = None
    policy: str = "listed"
    negative: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cut_long: bool = False
    controls: Mapping[str, Any] = field(default_factory=dict)
    given_frames: np.ndarray | None = None
    given_indices: Sequence[int] = ()

    def __post_init__(self) -> None:
        if isinstance(self.size, int):
            object.__setattr__(self, "size", (self.size, self.size))
        is_input = {name: isinstance(each, ControlInput) for name, each in self.controls.items()}
        controls = {
            name: each if is_input[name] else ControlInput(np.asarray(each)) for name, each in self.controls.items()
        }
        object.__setattr__(self, "controls", controls)

    @property
    def classes(self) -> Sequence[int | str] | None:
        return self.condition.get("label")

    @property
    def prompts(self) -> Sequence[str] | None:
        """The prompts of all rows as text; None without them, or if texts are given as tokens."""
        prompts = self.condition.get("text", ())
        return prompts if len(prompts) and all(isinstance(each, str) for each in prompts) else None

    def __len__(self) -> int:
        """The number of rows. Raises TesseraError if the lengths of the inputs differ."""
        for name, values in self._sequences.items():
            if isinstance(values, str):
                raise TesseraError(f"{name} is one text: give a list, [{values[:60]!r}]")
        counts = {name: len(values) for name, values in self._sequences.items()}
        if not all(counts.values()):
            raise TesseraError("nothing to generate: pass at least one seed, and one input for each condition")
        rows = max(counts.values())
        for name, count in counts.items():
            if count not in (1, rows):
                raise TesseraError(
                    f"{rows} images are requested, but there are {count} {name}: pass {rows}, or 1 for all"
                )
        return rows

    @cached_property
    def _sequences(self) -> dict[str, Sequence[Any]]:
        """Every input with an entry for each row or one for all rows, by a readable name."""
        scales = [] if self.guidance_scale is None else torch.as_tensor(self.guidance_scale).reshape(-1)
        names = {name: rules.input_name or name for name, rules in Condition.rules().items()}
        named = {names.get(name, name): values for name, values in self.condition.items()}
        named |= {f"negative {names.get(name, name)}": values for name, values in self.negative.items()}
        sequences = {"seeds": self.seeds, **named, "guidance scales": scales}
        image, mask = self._with_rows(self.init_image, 4), self._with_rows(self.mask, 3)
        sequences |= {} if image is None else {"images": image}
        sequences |= {} if mask is None else {"masks": mask}
        sequences |= {} if self.given_frames is None else {"clips of given frames": self._given_rows}
        for name, control in self.controls.items():
            sequences |= {f"images of control {name}": control.rows, f"strengths of control {name}": control.strengths}
        return {name: values for name, values in sequences.items() if name != "guidance scales" or len(values)}

    def _with_rows(self, array: np.ndarray | None, axes: int) -> np.ndarray | None:
        """An array [B, ...] of the same, or of an array for all rows. axes: of an array with rows, of images"""
        if array is None:
            return None
        array, is_clip = np.asarray(array), self.size is not None and len(self.size) == 3
        return array[None] if array.ndim == axes + is_clip - 1 else array

    @property
    def _given_rows(self) -> np.ndarray:
        """given_frames [B, F, H, W, C]"""
        frames = np.asarray(self.given_frames)
        return frames[None] if frames.ndim == 4 else frames

    def select(self, rows: Sequence[int]) -> "SampleRequest":
        """A request for some of the rows."""

        def chosen(values: Any) -> Any:
            repeated = list(rows) if len(values) != 1 else [0] * len(rows)
            if isinstance(values, np.ndarray | Tensor):
                return values[repeated]
            return [values[row] for row in repeated]

        image, mask = self._with_rows(self.init_image, 4), self._with_rows(self.mask, 3)
        scale = self.guidance_scale
        return replace(
            self,
            seeds=chosen(self.seeds),
            condition={name: chosen(values) for name, values in self.condition.items()},
            negative={name: chosen(values) for name, values in self.negative.items()},
            guidance_scale=scale
            if scale is None or not torch.as_tensor(scale).ndim
            else chosen(torch.as_tensor(scale)),
            init_image=None if image is None else chosen(image),
            mask=None if mask is None else chosen(mask),
            given_frames=None if self.given_frames is None else chosen(self._given_rows),
            controls={
                name: replace(each, images=chosen(each.rows), strength=chosen(each.strengths))
                for name, each in self.controls.items()
            },
        )

    def _inputs(self, model: Model) -> dict[str, Sequence[Any]]:
        """The inputs of the condition, with those that follow from the size of the images."""
        network = model.config.network
        rules, inputs = network.condition_type.rules(), dict(self.condition)
        for name in network.condition_fields:
            if name not in inputs and rules[name].from_size:
                size = np.shape(self.init_image)[:-1] if self.init_image is not None else self.size
                inputs[name] = [(size or image_size(model))[-2:]]
        return inputs

    def sampling(self, model: Model) -> SamplingConfig:
        """The sampling settings, guidance_scale included if it is one number. Raises TesseraError."""
        scale = self.guidance_scale
        is_number = scale is not None and torch.as_tensor(scale).ndim == 0
        changes = {"guidance_scale": float(scale)} if is_number else {}  # pyright: ignore[reportArgumentType]
        return sampling_config(model, **{**self.settings, **changes})

    def check(self, model: Model) -> SamplingConfig:
        """The sampling settings. Raises TesseraError for a request that the model cannot fulfill."""
        config, network = self.sampling(model), model.config.network
        len(self)
        check_inputs(self._inputs(model), network.condition_type, model.config)
        if bad := [seed for seed in self.seeds if not 0 <= seed < 2**63 or seed != int(seed)]:
            raise TesseraError(f"seeds are integers from 0 to 2^63 - 1; got {', '.join(map(str, bad[:5]))}")
        null_fields = model.null_fields
        frames = [FRAMES] if network.is_temporal else []
        if unknown := sorted(config.guidance_scales.keys() - {*null_fields, *frames}):
            known = ", ".join([*null_fields, *frames]) or "none"
            raise TesseraError(
                f"guidance_scales has {', '.join(unknown)}; the conditions of this model with a null value: {known}"
            )
        scales = self.scales(config)
        guided = bool((scales != 1).any())
        if self.guidance_model is not None:
            check_guidance_model(model, self.guidance_model)
            if not guided:
                raise TesseraError("a guidance model needs a guidance_scale other than 1, for example guidance_scale=2")
        self._check_weak_inputs(network, config, guided)
        latent_size(model, self.size)
        self._check_frames(model, config)
        config.sampler.check(model.diffusion)
        check_step_size(config.sampler, network.takes_step_size)
        check_caching(network, config.caching)
        return config

    def _check_frames(self, model: Model, config: SamplingConfig) -> None:
        """Raise TesseraError for given frames that do not fit, and for settings of frames without effect."""
        network, schedule = model.config.network, config.frame_schedule
        settings = {
            "given_frames": self.given_frames is not None,
            f"frame_schedule={schedule.kind}": not isinstance(schedule, Together),
            "guidance_scales.frames": config.guidance_scales.get(FRAMES, 1.0) != 1,
        }
        named = [name for name, is_set in settings.items() if is_set]
        if not named and not len(self.given_indices):
            return
        if problem := network.frame_times_problem():
            raise TesseraError(f"{named[0] if named else 'given_indices'} {problem}: leave it out")
        if self.init_image is not None and named:
            raise TesseraError(f"{named[0]} and init_image exclude each other: leave out one of them")
        check_schedule(schedule, config.sampler)
        is_alone = isinstance(schedule, Together | Pyramid) and not settings["given_frames"]
        if settings["guidance_scales.frames"] and is_alone:
            raise TesseraError("guidance_scales.frames has no effect: no frame is given, and all are sampled together")
        if settings["given_frames"]:
            self._check_given_frames(model)
        elif len(self.given_indices):
            raise TesseraError(f"given_indices {list(self.given_indices)} need the frames: pass given_frames, too")

    def _check_given_frames(self, model: Model) -> None:
        frames, (count, height, width) = self._given_rows, self.clip_size(model)
        channels = model.codec.pixel_channels
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[2:] != (height, width, channels):
            raise TesseraError(
                f"given_frames are uint8 [B, F, {height}, {width}, {channels}], or without B for all rows; got "
                f"{frames.dtype} {list(np.asarray(self.given_frames).shape)}"
            )
        indices = list(self.given_indices)
        if len(indices) != frames.shape[1] or not indices:
            raise TesseraError(f"given_frames has {frames.shape[1]} frames, and given_indices {len(indices)} numbers")
        if bad := [index for index in indices if not -count <= index < count]:
            raise TesseraError(f"given_indices has {bad[0]}, and the clip has frames 0 to {count - 1}")
        numbers = self.given_numbers(model)
        if len(set(numbers)) < len(numbers):
            raise TesseraError(f"given_indices {indices} name a frame of {count} twice")
        if len(numbers) == count:
            raise TesseraError(f"all {count} frames of the clip are given: nothing is left to sample")
        factor = model.codec.frame_factor
        if factor > 1 and (sorted(numbers) != list(range(len(numbers))) or (len(numbers) - 1) % factor):
            raise TesseraError(
                f"the codec compresses {factor} frames to one, so the given frames must be the first ones, one more "
                f"than a multiple of {factor}; got the frames {sorted(numbers)}"
            )

    def clip_size(self, model: Model) -> tuple[int, int, int]:
        """The size of the clips in pixels, (T, H, W)."""
        frames, height, width = (1, *(self.size or image_size(model)))[-3:]
        return frames, height, width

    def given_numbers(self, model: Model) -> list[int]:
        """The numbers of the given frames, from 0."""
        return [int(index) % self.clip_size(model)[0] for index in self.given_indices]

    def _check_weak_inputs(self, network: NetworkConfig, config: SamplingConfig, guided: bool) -> None:
        """Raise TesseraError for a null value that the model does not have, and for negative inputs without effect."""
        rules, uses_text = network.condition_type.rules(), "text" in network.condition_fields
        for name in self.negative:
            input_name = rules[name].input_name if name in rules else name
            if name not in network.condition_fields:
                raise TesseraError(f"this model is not conditioned on {input_name}: leave out negative {input_name}")
            if self.guidance_model is not None or not (guided or config.guidance_scales.get(name, 1) != 1):
                reason = "no effect at guidance_scale 1: set guidance_scale=4, for example"
                if self.guidance_model is not None:
                    reason = "no effect with a guidance model, which has the same condition: leave out one of them"
                raise TesseraError(f"negative {input_name} have {reason}")
        if config.null_text == "empty" and not uses_text:
            raise TesseraError("null_text=empty needs a model that is conditioned on text: leave it out")
        if not guided or self.guidance_model is not None:
            return
        has_negative = "text" in self.negative and all(each is not None for each in self.negative["text"])
        has_weak_text = "text" in network.null_fields or has_negative or config.null_text == "empty"
        if uses_text and not has_weak_text:
            raise TesseraError(
                "this model has no null text embedding: set null_text=empty, which guides away from an empty prompt, "
                "or give negative prompts"
            )
        if not uses_text and not network.null_fields and not self.controls:
            raise TesseraError("this model cannot be guided: it has no null label; leave guidance_scale at 1")

    def _negative(self, model: Model, config: SamplingConfig) -> Condition:
        """The fields that replace null values: negative inputs, or an empty prompt.

        Rows with a text of None, which keep the null embedding, have that of another row.
        """
        negative, uses_empty = dict(self.negative), config.null_text == "empty"
        is_guided = bool((self.scales(config) != 1).any()) or config.guidance_scales.get("text", 1) != 1
        texts = negative.pop("text", [None] if uses_empty and is_guided else [])
        default = "" if uses_empty else next((each for each in texts if each is not None), None)
        if texts and default is not None:
            negative["text"] = [default if each is None else each for each in texts]
            if all(isinstance(each, str) for each in negative["text"]):
                tokens, mask = model.text_encoder.encode_negative(negative["text"])
                negative["text"] = [row[valid] for row, valid in zip(tokens, mask)]
        return model.config.network.condition_type.encode(negative, model)

    def scales(self, config: SamplingConfig) -> Tensor:
        """The guidance scale of each row, float32 [B] or [1]."""
        scale = config.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return torch.as_tensor(scale, dtype=torch.float32).reshape(-1)

    def resolve(self, model: Model, joins: bool = False) -> "SampleRows":
        """The rows of the request, all checked and paired. joins: those of other requests. Raises TesseraError."""
        config, num_rows = self.check(model), len(self)
        network = model.config.network
        inputs = self._inputs(model)
        if self.cut_long and self.prompts is not None:
            text, mask = model.text_encoder.encode(self.prompts, cut=True)
            inputs["text"] = [tokens[valid] for tokens, valid in zip(text, mask)]
        condition = network.condition_type.encode(inputs, model)
        if self.controls or model.network.controls:  # otherwise the codec is not loaded yet
            size = np.shape(self.init_image)[:-1] if self.init_image is not None else self.size
            controls = encode_controls(model, self.controls, (size or image_size(model))[-2:], num_rows, joins)
            if controls is not None:
                condition = replace(condition, control=controls[0], control_strength=controls[1])
        null = _expand_condition(condition.null(model.null_fields), num_rows)
        weak = replace(null, **_expand_condition(self._negative(model, config), num_rows).present)
        is_null = torch.tensor([each is None for each in self.negative.get("text", ())])
        if config.null_text == "embedding" and bool(is_null.any()):
            rows = _expand(is_null, num_rows).nonzero()[:, 0]
            weak = weak.put(rows, replace(weak, text=null.text, text_mask=null.text_mask)[rows])
        image, mask = self._with_rows(self.init_image, 4), self._with_rows(self.mask, 3)
        if mask is not None and not np.isin(mask, (0, 1)).all():
            raise TesseraError(
                f"a mask is 1 where to generate and 0 where the image stays; got {mask.dtype} with other values"
            )
        return SampleRows(
            seed=_expand(torch.tensor(list(self.seeds), dtype=torch.int64), num_rows),
            condition=_expand_condition(condition, num_rows),
            weak=weak,
            scale=_expand(self.scales(config), num_rows),
            image=None if image is None else _expand(torch.from_numpy(np.ascontiguousarray(image)), num_rows),
            mask=None if mask is None else _expand(torch.from_numpy(mask != 0), num_rows),
            frames=None
            if self.given_frames is None
            else _expand(torch.from_numpy(np.ascontiguousarray(self._given_rows)), num_rows),
            config=config,
            request=self,
        )


@dataclass(frozen=True)
class SampleRows(Rows):
    """The rows of a request that was checked, with one entry for each row."""

    seed: Tensor  # int64 [B]
    condition: Condition
    weak: Condition  # that of the weak output of guidance: null values, or negative inputs
    scale: Tensor  # float32 [B] of guidance
    image: Tensor | None  # uint8 [B, H, W, C] to begin from
    mask: Tensor | None  # bool [B, H, W] true where to generate
    frames: Tensor | None  # uint8 [B, F, H, W, C] that are given
    config: SamplingConfig
    request: SampleRequest

    def __len__(self) -> int:
        return len(self.seed)


def _expand_condition(condition: Condition, num_rows: int) -> Condition:
    values: dict[str, Any] = {name: _expand(each, num_rows) for name, each in condition.present.items()}
    return type(condition)(**values)


def _expand(values: Tensor, num_rows: int) -> Tensor:
    return values.expand(num_rows, *values.shape[1:])


def sampling_config(model: Model, *, overrides: Sequence[str] = (), **settings: Any) -> SamplingConfig:
    """The model's own sampling settings with changes; None leaves a setting unchanged. Raises TesseraError.

    overrides: dotted assignments, as on the command line, applied last: ["sampler=dpm++", "sampler.order=3"].
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if not settings and not overrides:
        return model.config.sampling
    data = {**model.config.sampling.model_dump(), **settings}
    return validate(SamplingConfig, apply_overrides(data, overrides, SamplingConfig, "num_steps=20"), "sampling")


def check_guidance_model(model: Model, guidance_model: Model) -> None:
    """Raise TesseraError unless the outputs of two models can be combined."""
    problems = []
    names = ("in_channels", "input_size", "num_classes", "condition_fields", "text_channels", "vocabulary_size")
    for name in names:
        expected, value = getattr(model.config.network, name), getattr(guidance_model.config.network, name)
        if value != expected:
            problems.append(f"{name} {value}, not {expected}")
    texts = [each.config.text for each in (model, guidance_model)]
    expected, value = (text and (text.kind, getattr(text, "vocabulary", ())) for text in texts)
    if expected and value and value != expected:
        kinds = [text.kind for text in texts if text]
        problems.append(f"text {kinds[1]}, not {kinds[0]}" if kinds[0] != kinds[1] else "another vocabulary")
    expected, value = (each.config.diffusion.model_dump(include=OUTPUT_SETTINGS) for each in (model, guidance_model))
    if value != expected:
        problems.append(f"{guidance_model.config.diffusion.summary()}, not {model.config.diffusion.summary()}")
    if model.config.codec.kind != guidance_model.config.codec.kind:
        problems.append(f"codec {guidance_model.config.codec.kind}, not {model.config.codec.kind}")
    if model.device != guidance_model.device:
        problems.append(f"device {guidance_model.device}, not {model.device}")
    if problems:
        raise TesseraError(
            f"the guidance model does not match the model: {'; '.join(problems)}; use a smaller or earlier version"
        )


def image_size(model: Model) -> tuple[int, ...]:
    """The size of an image or clip in pixels that the model was trained at: (H, W) or (T, H, W)."""
    return model.codec.pixel_size(model.config.network.input_size)


def latent_size(model: Model, size: Sequence[int] | None) -> tuple[int, ...]:
    """The size of the latents of an image or clip (None: the trained size). Raises TesseraError."""
    network = model.config.network
    if size is None:
        latents = network.input_size
    else:
        if len(size) not in (2, 3):
            raise TesseraError(f"a size is (height, width) or (frames, height, width) in pixels; got {tuple(size)}")
        height, width = size[-2:]
        multiple = model.codec.factor * network.size_multiple
        if height % multiple or width % multiple or min(height, width) < multiple:
            raise TesseraError(f"size {height} x {width}: height and width must be multiples of {multiple} pixels")
        latents = model.codec.latent_size(size)
    try:
        network.check_size(latents)
    except ValueError as error:
        raise TesseraError(f"size {' x '.join(map(str, size or latents))}: {error}") from None
    return latents
