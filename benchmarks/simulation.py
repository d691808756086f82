"""Simulated training rates of many GPUs against published ones.

    python benchmarks/simulation.py [--only DiT]

DiT-XL/2 is planned by Tessera; language models are traced as Hugging Face's LlamaForCausalLM with the published sizes,
on fake tensors. Sources are in simulation.md. Exit code 1 if a ratio is outside the factor of its
case.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from functools import lru_cache

import torch

from tessera.planning.cluster import StepCost, simulate_step
from tessera.planning.hardware import GPUS, Hardware
from tessera.planning.plan import simulate
from tessera.planning.trace import Recorder, fake_tensors
from tessera.training.plan_recipe import plan_for_recipe, preset_recipe


@dataclass(frozen=True)
class Case:
    """A published rate. Of language models: width, depth, heads, key-value heads, width of the MLP, words."""

    system: str
    gpu: str
    devices: int
    shards: int
    rows: int  # per device and micro-batch
    rate: float  # published, of one device: images or tokens per second
    overrides: tuple[str, ...] = ()
    model: tuple[int, int, int, int, int, int] | None = None
    tokens: int = 0
    recompute: bool = False
    is_compiled: bool = False
    micro_batches: int = 1
    within: float = 1.25  # the largest factor between prediction and publication


TF32 = ("training.precision=float32", "training.compile=off")
DIT = ("training.compile=off", "training.precision=bfloat16")
MPT_7B, MPT_13B = (4096, 32, 32, 32, 10923, 50368), (5120, 40, 40, 40, 13653, 50368)
LLAMA2_7B, LLAMA3_8B = (4096, 32, 32, 32, 11008, 32000), (4096, 32, 32, 8, 14336, 128256)
CASES = (
    Case(
        "DiT, official script, TF32",
        "a100",
        8,
        1,
        32,
        26,
        ("training.precision=float32", "training.compile=off"),
        within=5,
    ),
    Case("DiT, fast-DiT", "a100", 1, 1, 128, 107, (*DIT, "training.activation_checkpointing=blocks"), within=2.5),
    Case("DiT, Open-Sora", "h100", 8, 1, 128, 166, (*DIT, "training.activation_checkpointing=blocks"), within=2.5),
    Case("LLM Foundry, MPT 7B", "a100", 8, 8, 6, 4641, (), MPT_7B, 2048, micro_batches=2),
    Case("LLM Foundry, MPT 7B", "h100", 8, 8, 6, 10643, (), MPT_7B, 2048),
    Case("LLM Foundry, MPT 13B", "h100", 8, 8, 2, 4792, (), MPT_13B, 2048),
    Case("LLM Foundry, MPT 13B", "h100", 64, 64, 2, 4800, (), MPT_13B, 2048),
    Case("fms-fsdp, Llama 2 7B, HSDP", "a100", 128, 8, 2, 3760, (), LLAMA2_7B, 4096, is_compiled=True),
    Case("torchtitan, Llama 3 8B", "h100", 8, 8, 2, 5762, (), LLAMA3_8B, 8192, True),
    Case("torchtitan, Llama 3 8B, compiled", "h100", 8, 8, 2, 6667, (), LLAMA3_8B, 8192, True, True),
    Case("torchtitan, Llama 3 8B", "h100", 128, 128, 2, 5605, (), LLAMA3_8B, 8192, True),
    Case("torchtitan, Llama 3 8B, compiled", "h100", 128, 128, 2, 6514, (), LLAMA3_8B, 8192, True, True),
)


@lru_cache
def trace_language_model(model: tuple[int, ...], depth: int, rows: int, tokens: int) -> tuple:
    """The traces of a forward and a backward pass, and the parameters of the whole and of a block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width, _, heads, kv_heads, mlp, words = model
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp,
        vocab_size=words,
        use_cache=False,
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
    )
    with torch.device("meta"):
        network = LlamaForCausalLM(config)
    with fake_tensors(), Recorder() as recorder:
        network.to_empty(device="cpu")
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        recorder.lap()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(ids).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
        forward = recorder.lap()
        loss.backward()
        backward = recorder.lap()
    count = sum(weight.numel() for weight in network.parameters())
    return forward, backward, count, sum(weight.numel() for weight in network.model.layers[0].parameters())


def language_cost(case: Case, hardware: Hardware) -> StepCost:
    """Weights are gathered and gradients reduced in bfloat16, as all of these systems do; AdamW in float32."""
    assert case.model is not None
    mode = "blocks" if case.is_compiled else "off"
    seconds = []
    for depth in (1, 2):
        traces = trace_language_model(case.model, depth, case.rows, case.tokens)
        seconds.append([max(hardware.device_and_host_seconds(part, mode)) for part in traces[:2]])
    (low, high), depth = seconds, case.model[1]
    forward, backward = (b - a for a, b in zip(low, high))
    _, _, count, block = trace_language_model(case.model, 1, case.rows, case.tokens)
    return StepCost(
        num_blocks=depth,
        block_forward=forward,
        block_backward=backward + forward * (0.5 if case.recompute else 0),  # selective: every second one
        rest_forward=low[0] - forward,
        rest_backward=low[1] - backward,
        update=(count + (depth - 1) * block) * 28 / hardware.bandwidth,  # reads 4 numbers of 4 bytes, writes 3
        block_bytes=2 * block,
        rest_bytes=2 * (count - block),
        accumulation_steps=case.micro_batches,
    )


def predict(case: Case) -> tuple[float, float]:
    """Images or tokens per second of one device, and the fraction of the step in which it waits for links."""
    hardware = GPUS[case.gpu].model_copy(update={"devices": case.devices})
    if case.model is None:
        batch = f"training.global_batch_size={case.rows * case.devices}"
        planned = plan_for_recipe(preset_recipe("DiT-XL/2", [*case.overrides, batch]), hardware)
        row = next(row for row in simulate(planned, [case.devices]) if row.shards == case.shards)
        return case.rows / row.step.total, row.step.exposed / row.step.total
    step = simulate_step(language_cost(case, hardware), hardware, case.devices, case.shards)
    samples = case.rows * case.micro_batches
    return samples * case.tokens / step.total, step.exposed / step.total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="systems whose name starts with this")
    options = parser.parse_args()
    print("| system | GPUs | sharding | predicted, per GPU and second | published | ratio | waits for links |")
    print("|---|---|---|---|---|---|---|")
    ratios, outside = [], []
    for case in CASES:
        if not case.system.startswith(options.only):
            continue
        rate, waits = predict(case)
        ratios.append(rate / case.rate)
        if not 1 / case.within <= ratios[-1] <= case.within:
            outside.append(case.system)
        print(
            f"| {case.system} | {case.devices} x {case.gpu.upper()} | {case.shards} x {case.devices // case.shards} | "
            f"{rate:,.4g} | {case.rate:,g} | {ratios[-1]:.2f} | {waits:.0%} |",
            flush=True,
        )
    print(f"\nmedian ratio {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    if outside:
        sys.exit(f"outside the stated factor: {', '.join(outside)}")


if __name__ == "__main__":
    main()
