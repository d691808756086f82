"""`tessera plan`: the cost of a run before it starts."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import Overrides, print_error, progress
from tessera.errors import TesseraError
from tessera.reporting.text import format_bytes as _bytes

if TYPE_CHECKING:
    from tessera.planning.cluster import Reliability
    from tessera.planning.plan import Plan, ScalingRow
    from tessera.planning.scaling_law import Law
    from tessera.training.recipe import Recipe


def plan(
    target: Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="a recipe, or a preset such as DiT-XL/2")],
    overrides: Overrides = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100, h100x8 (any number), a100x8, rtx4090, cpu or cuda (this machine)")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="8h, 90m, 2d, $200, 64gpuh or 1e18 (FLOPs); exit code 1 if it is too small")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="dollars per device hour (default: from the built-in table)")
    ] = None,
    law: Annotated[
        Path | None, typer.Option(help="law.json of a study: report the best model size for this compute")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="also simulate FSDP and HSDP on 8 to this many GPUs, with failures and storage"),
    ] = None,
    mtbf: Annotated[
        float | None, typer.Option(help="for --gpus: hours between failures of one GPU (default: 50,000)")
    ] = None,
    restart: Annotated[
        float | None, typer.Option(help="for --gpus: seconds from a failure to the next step (default: 600)")
    ] = None,
    storage: Annotated[
        float | None, typer.Option(help="for --gpus: GB/s that all GPUs write together (default: 10)")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure this machine again")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Estimate the cost of a run before it starts.

    It prints parameters, compute, memory, time, disk and money. Nothing is trained or downloaded.

    For a preset alone, parameters and multiply-adds are printed; with --hardware it is planned as the paper trained it.

    \b
    Examples:
      tessera plan DiT-XL/2
      tessera plan mine.yaml --hardware h100x8 --budget '$2000'
    """
    from tessera.planning import budget as budgets
    from tessera.planning import hardware as machines
    from tessera.planning import scaling_law
    from tessera.planning.op_profiler import OpProfiler
    from tessera.planning.plan import plan as make_plan
    from tessera.training.plan_recipe import is_preset, resolve_target, workload

    parsed_budget = None if budget is None else budgets.parse(budget)
    reliability = _reliability(gpus, mtbf, restart, storage)
    fitted_law = None if law is None else scaling_law.read_law(law)
    recipe = resolve_target(target, overrides or [])
    if is_preset(target) and hardware is gpus is None and budget is None and law is None and not measure:
        print(_short(target, recipe, as_json))
        return
    machine = machines.find(hardware, price)
    if parsed_budget is not None:
        parsed_budget.seconds(machine.devices, machine.price)  # raises for a missing price before anything is measured
    if gpus is not None and machine.is_local:
        raise TesseraError("--gpus simulates a known GPU, not this machine: give --hardware h100, h200 or a100")
    profiler = None
    if machine.is_local:
        from tessera.runtime import choose_device, keep_freed_memory

        keep_freed_memory()  # as training does
        profiler = OpProfiler(choose_device(machine.device), remeasure=measure)
    elif measure:
        raise TesseraError("--measure measures this machine: give --hardware cpu or cuda, or leave --hardware out")
    work = workload(recipe, target)
    with progress() as start:
        report = start("measuring operators") if machine.is_local else None
        result = make_plan(work, machine, budget=parsed_budget, profiler=profiler, progress=report)
    rows = [] if gpus is None else _simulate(result, gpus, reliability)
    if as_json:
        print(json.dumps(result.to_dict() | {"simulation": [asdict(row) for row in rows]}, indent=1))
    else:
        print("\n".join([format_plan(result, fitted_law), *format_simulation(rows)]))
    if result.budget is not None and not result.budget.enough:
        raise TesseraError(
            f"the budget of {budget} is too small: it pays for {result.budget.steps:,} of {work.steps:,} steps; "
            f"set training.steps={result.budget.steps} or a larger budget"
            if result.budget.steps
            else f"the budget of {budget} is too small for one step beside sampling and evaluation"
        )
    if not result.fits:
        print_error(
            f"warning: the run does not fit: it needs {_bytes(result.memory_bytes)} of {_bytes(machine.usable_bytes)} "
            "usable; "
            "see the alternatives that fit, or lower training.micro_batch_size"
        )


def _reliability(gpus: int | None, mtbf: float | None, restart: float | None, storage: float | None) -> "Reliability":
    """The options of --gpus, checked."""
    from tessera.planning.cluster import Reliability

    values = {"mtbf": mtbf, "restart": restart, "storage": storage}
    names = [f"--{name}" for name, value in values.items() if value is not None]
    if names and gpus is None:
        raise TesseraError(f"{', '.join(names)} has no effect without --gpus: give --gpus, or leave it out")
    for name, value in {"gpus": gpus, **values}.items():
        if value is not None and not (value >= 0 if name == "restart" else value > 0):
            raise TesseraError(f"--{name} is {value:g}; expected {'0 or more' if name == 'restart' else 'more than 0'}")
    default = Reliability()
    return Reliability(
        device_hours=default.device_hours if mtbf is None else mtbf,
        restart=default.restart if restart is None else restart,
        storage=default.storage if storage is None else storage * 1e9,
    )


def _simulate(result: "Plan", gpus: int, reliability: "Reliability") -> "list[ScalingRow]":
    from tessera.planning.plan import simulate

    return simulate(result, [count for count in (8, 64, 512, 4096) if count < gpus] + [gpus], reliability)


def format_simulation(rows: "list[ScalingRow]") -> list[str]:
    """The simulation as lines of text: two tables."""
    lines = []
    for scaling, title in (("strong", "the same global batch"), ("weak", "the same batch per GPU")):
        chosen = [row for row in rows if row.scaling == scaling]
        if not chosen:
            continue
        base = max(row.images_per_second / row.devices for row in chosen if row.devices == chosen[0].devices)
        lines += [
            "",
            f"simulation   {scaling} scaling ({title}); images/s after the loss by failures and checkpoints",
            "             GPUs  shards   batch  s/step  waits for links  memory  fits  saves every  loss   read/s  "
            "images/s  efficiency",
        ]
        for row in chosen:
            lines.append(
                f"            {row.devices:>5}  {row.shards:>6}  {row.global_batch_size:>6}  {row.step.total:>6.3f}  "
                f"{row.step.exposed / row.step.total:>15.0%}  {_bytes(row.memory.peak):>6}  "
                f"{'yes' if row.fits else 'no':<4}  {row.failures.interval / 60:>7.1f} min  {row.failures.loss:>4.1%}  "
                f"{_bytes(int(row.read_rate)):>7}  {row.images_per_second:>8,.0f}  "
                f"{row.images_per_second / row.devices / base:>10.0%}"
            )
    return lines


def _short(name: str, recipe: "Recipe", as_json: bool) -> str:
    from tessera.planning import FLOPS_PER_MAC
    from tessera.planning.plan import count_macs_and_parameters

    macs, parameters = count_macs_and_parameters(recipe.network)
    if as_json:
        facts = {"name": name, "parameters": parameters, "gmacs": macs / 1e9, "flops_per_sample": FLOPS_PER_MAC * macs}
        return json.dumps(facts | {"network": recipe.network.model_dump(mode="json")}, indent=1)
    size = " x ".join(map(str, (*recipe.network.input_size, recipe.network.in_channels)))
    return "\n".join(
        (
            f"{name}: {recipe.network.summary()}",
            f"parameters  {parameters:,}",
            f'GMACs       {macs / 1e9:.2f} per forward pass of {size} (the paper\'s "Gflops")',
            f"training    {FLOPS_PER_MAC * macs:.4g} FLOPs per sample",
        )
    )


def format_plan(plan: "Plan", law: "Law | None" = None) -> str:
    """The plan as text."""
    from tessera.reporting.text import format_duration

    work, hardware, memory, split = plan.workload, plan.hardware, plan.memory, plan.layout
    micro_batches = f", {split.accumulation_steps} micro-batches" if split.accumulation_steps > 1 else ""
    lines = [
        work.name,
        f"network      {work.network.summary()}",
        f"             {plan.parameters:,} parameters, {plan.gmacs:.4g} GMACs per forward pass",
        *_adapter(plan),
        f"training     {work.steps:,} steps of {work.global_batch_size} "
        f"({split.micro_batch_size} per device{micro_batches}): "
        f"{plan.flops_per_step / work.global_batch_size:.4g} FLOPs per sample, {plan.flops:.4g} in total",
        *([f"text         {work.text}"] if work.text else []),
        f"hardware     {hardware.title}: {hardware.source}",
        "",
        f"memory       peak {_bytes(plan.memory_bytes)} per device of {_bytes(hardware.usable_bytes)} usable: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        f"             weights {_bytes(memory.weights)}, EMA {_bytes(memory.ema)}, optimizer "
        f"{_bytes(memory.optimizer)}, gradients {_bytes(memory.gradients)}, activations {_bytes(memory.activations)}"
        + (f", copies for a checkpoint {_bytes(memory.saving)}" if memory.saving else "")
        + (f"; {_bytes(memory.loading)} while loading" if memory.loading else ""),
    ]
    if plan.alternatives:
        lines += [*_alternatives(plan), ""]
    if plan.largest_batch is not None:
        model = plan.largest_model or "none"
        lines.append(
            f"fits         largest micro-batch {plan.largest_batch:,}; largest preset at this size and batch: {model}"
        )
    basis = "measured operator by operator" if hardware.is_local else "estimated"
    lines += [
        f"speed        {plan.images_per_second:,.4g} images/s, {plan.step_seconds:.4g} s per step, "
        f"{plan.mfu:.0%} of the peak matrix rate ({basis}"
        + ("; without the gain of compilation" if hardware.is_local and work.compile_mode != "off" else "")
        + ")",
        f"time         {format_duration(plan.seconds)} training"
        + (
            f" (including {format_duration(plan.encode_seconds * work.steps)} of encoding)"
            if plan.encode_seconds
            else ""
        )
        + f", {format_duration(plan.evaluation_seconds)} for {work.sampling.grid_images:,} images in grids and "
        f"{work.sampling.scored_images:,} in {work.sampling.num_evaluations} evaluations: "
        f"{format_duration(plan.total_seconds)} total",
        f"cost         {plan.device_hours:.4g} device hours"
        + (f", ${plan.cost:,.2f} at ${hardware.price:g} per hour" if hardware.price else ""),
        f"disk         {_bytes(plan.disk_bytes)} for {work.num_checkpoints} checkpoints of "
        f"{_bytes(plan.checkpoint_bytes)}"
        + (f" and the base, {_bytes(work.adapter.base_bytes)}" if work.adapter else "")
        + (
            f" and {work.num_snapshots} snapshots of the EMA of {_bytes(plan.snapshot_bytes)}"
            if work.num_snapshots
            else ""
        )
        + _data(plan),
    ]
    if plan.budget is not None:
        outcome = plan.budget
        lines.append(
            f"budget       {outcome.text} pays for {outcome.steps:,} steps: {outcome.samples:,} samples, "
            f"{outcome.flops:.4g} FLOPs" + ("" if outcome.enough else f"; the run has {work.steps:,} steps")
        )
    lines += _optimal(plan, law)
    lines += [f"note         {note}" for note in plan.notes]
    return "\n".join(lines)


def _adapter(plan: "Plan") -> list[str]:
    adapter = plan.workload.adapter
    if adapter is None:
        return []
    share = adapter.trained_parameters / plan.parameters
    base = f"the base in {adapter.base_weights}"
    return [f"adapter      {adapter.summary}: {adapter.trained_parameters:,} parameters ({share:.1%}), {base}"]


def _alternatives(plan: "Plan") -> list[str]:
    lines = ["", "             precision  checkpointing  shards  activations      peak  fits   images/s"]
    for choice in plan.alternatives:
        rate = "" if choice.step_seconds is None else f"{plan.workload.global_batch_size / choice.step_seconds:,.4g}"
        current = (plan.precision, plan.workload.activation_checkpointing, plan.layout.shards)
        mark = ">" if (choice.precision, choice.activation_checkpointing, choice.shards) == current else " "
        lines.append(
            f"           {mark} {choice.precision:<9}  {choice.activation_checkpointing:<13}  {choice.shards:>6}  "
            f"{_bytes(choice.memory.activations):>11}  {_bytes(choice.memory.peak):>8}  "
            f"{'yes' if choice.fits else 'no':<4}  {rate:>9}".rstrip()
        )
    return lines


def _data(plan: "Plan") -> str:
    work = plan.workload
    if work.num_images is None:
        latents = f", {_bytes(work.latent_bytes)} of latents per image" if work.latent_bytes else ""
        return f"; without data{latents}"
    pixels = f"; {work.num_images:,} images, {_bytes(work.num_images * work.image_bytes)} as pixels"
    return pixels + (f", {_bytes(plan.latents_bytes or 0)} as cached latents" if work.latent_bytes else "")


def _optimal(plan: "Plan", law: "Law | None") -> list[str]:
    """The optimal model size at the compute of the budget, or of the whole run, by a scaling law."""
    flops = plan.flops if plan.budget is None else plan.budget.flops
    if flops <= 0:
        return []
    if law is not None:
        best = law.optimal(flops)
        far = f"; extrapolated by a factor of {best.extrapolation:.3g}" if best.extrapolation > 1 else ""
        return [
            f"optimal      {law.source}: at {flops:.3g} FLOPs {best.gmacs:.3g} GMACs and {best.samples:,.0f} "
            f"samples ({best.samples / plan.workload.global_batch_size:,.0f} steps of "
            f"{plan.workload.global_batch_size}); expected {law.metric} "
            f"{best.metric.value:.4g} ({best.metric.low:.4g} to {best.metric.high:.4g}){far}"
        ]
    from tessera.planning.budget import best_published

    return [f"optimal      {best_published(flops)}"]
