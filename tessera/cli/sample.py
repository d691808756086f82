"""`tessera sample`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from tessera.cli import launching
from tessera.cli.options import (
    EMA,
    MAX_SAMPLES,
    Adapters,
    AnyBase,
    CheckpointType,
    ClassPolicy,
    Codec,
    Device,
    EMALength,
    Launch,
    LaunchOptions,
    ModelPath,
    NumClasses,
    NumHeads,
    Precision,
    SampleSize,
    SamplingOverrides,
    Shard,
    Tasks,
    TextEncoder,
    parse_sample_size,
    parse_shard,
)
from tessera.errors import TesseraError


def sample(
    model: ModelPath,
    overrides: SamplingOverrides = None,
    classes: Annotated[
        str | None, typer.Option(help="names or numbers: cat,dog or 3,7 or all; quoted as in CSV: '\"red, blue\",cat'")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="a description of the image, for a text model; repeatable")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="a .txt with one prompt per line, or a .csv or .jsonl with the columns prompt, negative_prompt, "
            "guidance_scale, seed"
        ),
    ] = None,
    cut_prompts: Annotated[
        bool, typer.Option("--cut-prompts", help="cut prompts that are too long for the text encoder")
    ] = False,
    negative_prompt: Annotated[str | None, typer.Option(help="what guidance leads away from")] = None,
    per_class: Annotated[int | None, typer.Option(min=1, help="images per class or prompt (default: 1)")] = None,
    seeds: Annotated[str | None, typer.Option(help="0-15 or 1,5,9, for example; a seed determines its image")] = None,
    num_samples: Annotated[
        int | None, typer.Option(min=1, max=MAX_SAMPLES, help="total number; --class-policy chooses the classes")
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(help="data whose captions are the prompts for --num-samples (default: the training data)"),
    ] = None,
    class_policy: ClassPolicy = "uniform",
    size: SampleSize = None,
    frames: Annotated[int | None, typer.Option(min=1, help="frames per clip (default: as trained)")] = None,
    fps: Annotated[
        float | None, typer.Option(help="frames per second of the files of clips (default: as trained, or 8)")
    ] = None,
    format: Annotated[
        Literal["webp", "mp4", "webm", "gif", "frames"] | None,
        typer.Option(
            help="file format of clips in a folder (default: webp, lossless); frames: a folder of PNGs per clip"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    precision: Precision = "float32",
    device: Device = "auto",
    out: Annotated[
        Path, typer.Option(help="a folder, or a .png for only the grid; for clips also .mp4, .webm, .webp or .gif")
    ] = Path("samples"),
    npz: Annotated[Path | None, typer.Option(help="write one .npz in the format of the ADM suite instead")] = None,
    shard: Shard = None,
    launch: Launch = None,
    tasks: Tasks = None,
    launch_option: LaunchOptions = None,
    guidance_model: Annotated[
        str | None,
        typer.Option(
            help="autoguidance: a weaker model of the same kind, such as an early checkpoint; routed: the model itself "
            "with fewer tokens, if it was trained with training.token_routing"
        ),
    ] = None,
    init_image: Annotated[str | None, typer.Option(help="start from this image, cropped to --size")] = None,
    strength: Annotated[
        float | None, typer.Option(help="how much --init-image may change, 0 to 1 (default: 0.6, or 1 with --mask)")
    ] = None,
    mask: Annotated[
        str | None, typer.Option(help="inpainting: an image that is white where --init-image is replaced")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="the first frame of the clips, an image")] = None,
    last: Annotated[str | None, typer.Option(help="the last frame of the clips, an image")] = None,
    numbered: Annotated[
        list[str] | None,
        typer.Option("--given", help="NUMBER=IMAGE for any frame of the clips, counted from 0; repeatable"),
    ] = None,
    extend: Annotated[str | None, typer.Option(help="continue this clip, to --frames frames in total")] = None,
    precede: Annotated[
        str | None, typer.Option(help="generate the frames before this clip, --frames frames in total")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="compile the network first; worthwhile for many images")
    ] = False,
    ema: EMA = None,
    ema_length: EMALength = None,
    checkpoint_type: CheckpointType = None,
    num_heads: NumHeads = None,
    num_classes: NumClasses = None,
    codec: Codec = None,
    text_encoder: TextEncoder = None,
    adapter: Adapters = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=IMAGE:STRENGTH for an adapter that is a control, such as edges=photo.png:0.8; repeatable"
        ),
    ] = None,
    control_map: Annotated[
        list[str] | None, typer.Option(help="the same with a finished control image, such as a sketch of edges")
    ] = None,
    any_base: AnyBase = False,
) -> None:
    """Generate images or clips: a file for each, and a grid. `tessera info FILE` prints the command that reproduces it.

    To resume after an interruption, repeat the command. The work of --npz can be divided: among the ranks of torchrun,
    or with --launch among tasks on this machine, in a Ray cluster or on SLURM.

    \b
    Examples:
      tessera sample runs/mine --classes cat,dog --seeds 0-7 guidance_scale=2
      tessera sample runs/text --prompt "a red circle" --per-class 4
    """
    from tessera.cli import image_files
    from tessera.cli.given_frames import read_given_frames
    from tessera.cli.prompts import read_prompts
    from tessera.interop import load

    if num_samples is not None and (classes or per_class or seeds or prompt or prompts or negative_prompt):
        raise TesseraError(
            "--num-samples sets classes, prompts and seeds: leave out --classes, --prompt, --prompts, "
            "--negative-prompt, --per-class and --seeds"
        )
    part = None if shard is None else parse_shard(shard)
    launched = launching.Launch.parse(launch, tasks, launch_option, shard)
    if npz is None and (launched is not None or part is not None):
        raise TesseraError(
            f"{'--launch' if part is None else '--shard'} is for many images in one file: add --npz FILE"
        )
    prompt_list = read_prompts(prompt or [], prompts, negative_prompt)
    loaded = load.load(
        model,
        device=device,
        ema=ema,
        ema_length=ema_length,
        checkpoint_type=checkpoint_type,
        num_heads=num_heads,
        num_classes=num_classes,
        codec=codec,
        text_encoder=text_encoder,
        adapters=adapter or (),
        any_base=any_base,
    )
    if cut_prompts:
        image_files.cut_long_prompts(loaded, prompt_list)
    request = image_files.make_request(
        loaded,
        classes,
        per_class,
        seeds,
        num_samples,
        class_policy,
        prompt_list,
        captions,
        settings={"overrides": overrides or []},
        precision=precision,
        size=image_files.sample_size(loaded, parse_sample_size(size), frames),
    )
    clip_format = image_files.ClipFormat.of(loaded, request, out, fps, format)
    inputs, hashes = image_files.read_inputs(
        loaded, guidance_model, init_image, strength, mask, request.size, control or (), control_map or ()
    )
    frame_inputs, frame_hashes = read_given_frames(
        loaded, request.size, fps, first, last, numbered or (), extend, precede
    )
    inputs, hashes = inputs | frame_inputs, hashes | frame_hashes
    if compile:
        image_files.compile_network(loaded)
    if npz is not None:
        if fps is not None or format is not None:
            raise TesseraError("--npz has no frame rate and one format: leave out --fps and --format")
        if inputs:
            raise TesseraError(
                "--npz takes one model and no image: leave out --guidance-model, --init-image, --strength, --mask, "
                "--control and given frames"
            )
        image_files.write_npz(loaded, request, npz, batch_size, model, part, launched)
        return
    request = replace(request, **inputs)
    options = {
        "ema": ema,
        "ema-length": ema_length,
        "cut-prompts": cut_prompts or None,
        "checkpoint-type": checkpoint_type,
        "num-heads": num_heads,
        "num-classes": num_classes,
        "codec": codec,
        "text-encoder": text_encoder,
        "adapter": adapter,
        "control": control,
        "control-map": control_map,
        "any-base": any_base or None,
        "precision": None if precision == "float32" else precision,
        "size": None if request.size is None else "x".join(map(str, request.size)),
        "fps": fps,
        "format": format,
        "guidance-model": guidance_model,
        "init-image": init_image,
        "strength": strength,
        "mask": mask,
        "from": first,
        "last": last,
        "given": numbered,
        "extend": extend,
        "precede": precede,
    }
    options = {name: value for name, value in options.items() if value is not None}
    image_files.write_images(
        loaded, request, out, batch_size, {"model": model, "options": options, **hashes}, clip_format
    )
