"""Every script in benchmarks/ runs, at sizes so small that it takes seconds. Its numbers mean nothing then."""

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
# Arguments that make a script fast. The first ones of each script run in every test run, unless the script is among the
# SLOW ones; the others in `make prove`.
# {tmp} is an empty folder, {images} holds small photographs, {codec} a codec
SMALL = {
    "adapter_memory": ["--out {tmp} --model DiT-S/8 --batch 1 --steps 1 --only '+ base in nf4; full fine-tuning'"],
    "against_diffusers": ["--models DiT-S/8 --batches 1 --rounds 1"],
    "against_diffusers_solvers": ["--model DiT-S/8 --batches 1 --steps 2 --rounds 1"],
    "block_speed": ["--grid 2 --batch 2 --rounds 1", "--text 4 --grid 2 --batch 2 --width 32 --depth 1 --rounds 1"],
    "codecs": ["photos {codec} {images}"],
    "conditioning": [
        "worth --data digits",
        "train --width 16 --depth 1 --steps 1 --batch 4 --count 20 'std 1+balanced' 'table rate x10+normalized'",
    ],
    "continuous": ["--rows 4 --steps 2 --rounds 1"],
    "control": ["{shapes} --work {tmp} --steps 1 --batch 2 --count 2 --seeds 1 --only edges"],
    "data_build": ["--data {parquet} --counts 100"],
    "data_check": ["--only report --samples 2000"],
    "data_index": ["--samples 2000 --epochs 1"],
    "digit_recipes": ["--steps 2 --each 1 training.seed=1"],
    "doctor": ["--steps 10 --out {tmp} digits"],
    "emoji_text": ["{text_model} --data {parquet}/train.parquet --out {tmp} --seeds 2 --known 'image 3' --new nothing"],
    "evaluation_distances": [
        "frechet --widths 16 --repeats 1",
        "coverage --widths 16 --repeats 2",
        "cost --rows 100 --width 16",
    ],
    "evaluation_real": ["--data {parquet} --features shapes --count 390"],
    "evaluation_speed": ["memory --samples 64", "torchmetrics --scale 0.25 --rounds 1"],
    "faults": ["--processes 1 --out {tmp} nan"],
    "few_steps": ["run --out {tmp} --seeds 0 --steps 2 --samples 20 alpha-flow"],
    "frame_cache": ["--frames 3 --steps 1 --rounds 1 --sides 8 --width 64 --depth 1"],
    "gpu_throughput": [
        "--train --model DiT-S/8 --micro 1 --seconds 0.1",
        "--sample --model DiT-S/8 --batch 1 --samplers ddim:2",
    ],
    "guidance_halves": ["--batches 1 --seconds 0.1 --widths 64 --sides 2"],
    "imagenet_encoder": ["--out {tmp}"],
    "lanes_features": ["--out {tmp}/features --steps 1 --count 100"],
    "lanes_oracle": ["--count 4", "--count 4 --distances"],
    "latent_cache": [
        "read --count 64 --threads 1 --rounds 1",
        "million --counts 64",
        "encode --count 4 --size 32 --workers 1",
    ],
    "ablations": ["run --out {tmp} --steps 2 --seeds 0 --rates 0.5 paper"],
    "lora_digits": ["{digits} --work {tmp} --steps 1 --each 2 --seeds 1 --rates 1 --only 'LoRA, rank 4'"],
    "loader": ["--only photos --photos 70 --side 350 --rounds 1 --seconds 0.1 --workers 1"],
    "overheads": ["--width 32 --depth 1 --batch 4 --rounds 1"],
    "paper_law": ["--out {tmp}"],
    "rounding": ["{digits} --seeds 1 num_steps=1", "{text_model} --prompts image --seeds 1 num_steps=1"],
    "plan": ["--threads 1 --rounds 1 --only 'digits, batch 8'"],
    "post_hoc_ema": ["--out {tmp} --steps 8 --samples 20 --lengths 0.05,0.08"],
    "precomputed_modulation": ["--models digits --batches 1 --seconds 0.1"],
    "serving": [
        "throughput --requests 2 --shorter 10 --rounds 1",
        "latency --model tiny --requests 11 --rounds 1 --replayed 50",
        "storm --requests 60 --clients 6",
        "refusal --requests 5",
    ],
    "simulation": ["--only 'LLM Foundry'"],
    "sharding": ["--width 32 --depth 1 --batch 4 --steps 1 --max-processes 1"],
    "sprites": ["write --data {sheets} --out {tmp} --limit 1", "check --data {sheets} --count 1"],
    "solver_orders": ["--counts 4 8 --noise-counts 4 8"],
    "versions": [
        f"forward --before {ROOT} --rounds 1",
        f"step --before {ROOT} --batch 2 --rounds 1",
        f"generate --before {ROOT} --count 4 --rounds 1",
    ],
    "subjects": ["{digits} --work {tmp} --steps 1 --prior 1 --each 1 --seeds 1"],
    "training_step": ["--model digits --batch 2 --ways eager --seconds 1"],
}

SLOW = {  # even so, each takes seconds
    "ablations", "adapter_memory", "against_diffusers", "against_diffusers_solvers", "data_build", "digit_recipes",
    "doctor", "evaluation_real", "evaluation_speed", "faults", "few_steps", "gpu_throughput", "loader", "plan",
    "serving", "sharding", "solver_orders", "subjects", "training_step", "versions",
}  # fmt: skip


@pytest.fixture(scope="session")
def places(tmp_path_factory) -> dict[str, Path]:
    """Folders that scripts read."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    pa = pytest.importorskip("pyarrow")
    import io

    import pyarrow.parquet

    from tessera.data.shapes import COLORS, SHAPES

    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "images").mkdir()
    Image.fromarray(random.integers(0, 256, (32, 48, 3), np.uint8)).save(folder / "images/noise.png")
    torch.manual_seed(0)
    codec = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    codec.save_pretrained(folder / "codec")
    (folder / "parquet").mkdir()
    for split in ("train", "test"):
        cells = []
        for _ in range(440):
            buffer = io.BytesIO()
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(buffer, "PNG")
            cells.append({"bytes": buffer.getvalue(), "path": None})
        columns = {"label": [row % 10 for row in range(440)], "text": [f"image {row}" for row in range(440)]}
        table = pa.table({"image": cells, **columns})
        pyarrow.parquet.write_table(table, folder / "parquet" / f"{split}.parquet")
    _save_text_model(folder / "text-model")
    words = ("a", "small", "large", *COLORS, *SHAPES, "left", "right", "above", "below", "of")
    _save_text_model(folder / "shapes", words, depth=2, tokens=11)
    _save_digits_model(folder / "digits")
    for part in ("body", "bottomwear", "topwear", "hair", "shoes"):
        (folder / "sheets" / part).mkdir(parents=True)
        for variant in range(6):
            sheet = random.integers(0, 256, (17 * 64, 13 * 64, 4), np.uint8)
            Image.fromarray(sheet).save(folder / "sheets" / part / f"{variant}.png")
    names = ("images", "codec", "parquet", "digits", "shapes", "sheets")
    return {name: folder / name for name in names} | {"text_model": folder / "text-model"}


def _save_digits_model(folder: Path) -> None:
    from tessera import bundle
    from tessera.bundle import BundleConfig, Model

    network = {
        "kind": "dit", "input_size": 8, "in_channels": 1, "out_channels": 1, "num_classes": 10, "patch_size": 4,
        "depth": 1, "hidden_size": 32, "num_heads": 2,
    }  # fmt: skip
    diffusion = {"kind": "gaussian", "variance": "posterior", "prediction": "v"}
    parts = {"network": network, "diffusion": diffusion, "codec": {"kind": "pixels", "channels": 1}}
    config = BundleConfig.model_validate({**parts, "class_names": [str(digit) for digit in range(10)]})
    bundle.save(Model(config, config.network.build()), folder)


def _save_text_model(folder: Path, words: tuple[str, ...] = ("image",), depth: int = 1, tokens: int = 4) -> None:
    from tessera import bundle
    from tessera.bundle import BundleConfig, Model
    from tessera.encoders.text import WordsConfig

    text = WordsConfig(vocabulary=words)
    network = {
        "kind": "dit", "input_size": 32, "in_channels": 3, "out_channels": 3, "num_classes": 0, "patch_size": 8,
        "depth": depth,
        "hidden_size": 32, "num_heads": 2, "vocabulary_size": text.build().vocabulary_size, "text_tokens": tokens,
        "block": {"kind": "rope-swiglu", "text": "keys"},
    }  # fmt: skip
    settings = {"network": network, "diffusion": {"kind": "flow"}, "codec": {"kind": "pixels", "channels": 3}}
    config = BundleConfig.model_validate({**settings, "text": text.model_dump(), "sampling": {"num_steps": 2}})
    bundle.save(Model(config, config.network.build().eval()), folder)


def test_every_script_is_in_the_table():
    assert sorted(SMALL) == SCRIPTS


@pytest.mark.run
@pytest.mark.parametrize(
    ("script", "words"),
    [
        pytest.param(name, words, marks=[pytest.mark.slow] if number or name in SLOW else [])
        for name, calls in SMALL.items()
        for number, words in enumerate(calls)
    ],
)
def test_a_script_runs(script, words, places, tmp_path, processes):
    arguments = shlex.split(words.format(tmp=tmp_path, **places))
    environment = {"OMP_NUM_THREADS": "1", "TESSERA_CACHE": str(tmp_path / "cache")}
    command, output, log = (
        [str(ROOT / "benchmarks" / f"{script}.py"), *arguments],
        tmp_path / "output",
        tmp_path / "log",
    )
    process = processes.program(command, output, log, tmp_path, environment)
    process.join()
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert output.read_text().strip()
