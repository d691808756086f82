"""`tessera plan`: what a run takes, before it begins."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tessera.cli.options import progress
from tessera.errors import TesseraError

if TYPE_CHECKING:
    from tessera.planning.plan import Plan
    from tessera.planning.scaling_law import Law
    from tessera.training.recipe import Recipe


def plan(
    target: Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="a recipe, or a preset such as DiT-XL/2")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[key=value]...", help="dotted settings")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="h100, h100x8 (any number), a100x8, rtx4090, cpu or cuda (this machine)")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="8h, 90m, 2d, $200, 64gpuh or 1e18 (FLOPs): what it buys; exit 1 if too little")
    ] = None,
    price: Annotated[float | None, typer.Option(help="dollars for a device and an hour (the table's)")] = None,
    law: Annotated[Path | None, typer.Option(help="a study's law.json: the best size for this compute")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="measure this machine again")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Parameters, compute, memory, time, disk and money of a run before it begins. Nothing is trained or downloaded.

    A preset alone tells its parameters and multiply-adds; with --hardware it is planned as the paper trained it.
    """
    from tessera.planning import budget as budgets
    from tessera.planning import hardware as machines
    from tessera.planning import scaling_law as laws
    from tessera.planning.op_profiler import OpProfiler
    from tessera.planning.plan import plan as planned
    from tessera.training.plan_recipe import is_preset, resolve_target, workload

    allowed = None if budget is None else budgets.parse(budget)
    known = None if law is None else laws.read(law)
    recipe = resolve_target(target, overrides or [])
    if is_preset(target) and hardware is None and allowed is None and law is None and not measure:
        print(_short(target, recipe, as_json))
        return
    machine = machines.find(hardware, price)
    if allowed is not None:
        allowed.seconds(machine.devices, machine.price)  # a price that is missing, before anything is measured
    stopwatch = None
    if machine.here:
        from tessera.runtime import choose_device, keep_freed_memory

        keep_freed_memory()  # as training does
        stopwatch = OpProfiler(choose_device(machine.device), afresh=measure)
    elif measure:
        raise TesseraError("--measure measures this machine: give --hardware cpu or cuda, or leave --hardware out")
    work = workload(recipe, target)
    with progress() as begin:
        bar = begin("measuring operators") if machine.here else None
        told = planned(work, machine, budget=allowed, stopwatch=stopwatch, progress=bar)
    print(json.dumps(told.facts(), indent=1) if as_json else page(told, known))
    if told.budget is not None and not told.budget.enough:
        raise TesseraError(
            f"the budget of {budget} is too small: it buys {told.budget.steps:,} of {work.steps:,} steps; set "
            f"training.steps={told.budget.steps} or give more"
            if told.budget.steps
            else f"the budget of {budget} is too small for one step beside drawing and scoring"
        )
    if not told.fits:
        print(
            f"warning: it does not fit: {_bytes(told.memory_bytes)} of {_bytes(machine.room)} usable; see the choices "
            "that fit, or lower training.micro_batch_size",
            file=sys.stderr,
        )


def _short(name: str, recipe: "Recipe", as_json: bool) -> str:
    from tessera.planning.plan import FLOPS_PER_MAC, counts

    macs, parameters = counts(recipe.network)
    if as_json:
        told = {"name": name, "parameters": parameters, "gmacs": macs / 1e9, "flops_per_sample": FLOPS_PER_MAC * macs}
        return json.dumps(told | {"network": recipe.network.model_dump(mode="json")}, indent=1)
    height, width = recipe.network.input_size
    return "\n".join(
        (
            f"{name}: {recipe.network.summary()}",
            f"parameters  {parameters:,}",
            f"GMACs       {macs / 1e9:.2f} a forward pass of {height} x {width} x {recipe.network.in_channels} (the "
            'paper\'s "Gflops")',
            f"training    {FLOPS_PER_MAC * macs:.4g} FLOPs a sample",
        )
    )


def page(plan: "Plan", law: "Law | None" = None) -> str:
    """The plan, for people."""
    from tessera.monitoring.logger import format_duration

    work, hardware, memory, split = plan.work, plan.hardware, plan.memory, plan.split
    rows = f"{split.rows} at once" + (f", {split.rounds} rounds" if split.rounds > 1 else "")
    lines = [
        work.name,
        f"network      {work.network.summary()}",
        f"             {plan.parameters:,} parameters, {plan.gmacs:.4g} GMACs a forward pass",
        f"training     {work.steps:,} steps of {work.batch} ({rows}): {plan.flops_per_step / work.batch:.4g} FLOPs a "
        f"sample, {plan.flops:.4g} in all",
        f"hardware     {hardware.title}: {hardware.source}",
        "",
        f"memory       {_bytes(plan.memory_bytes)} a device at the highest, of {_bytes(hardware.room)} usable: "
        + ("fits" if plan.fits else "DOES NOT FIT"),
        f"             weights {_bytes(memory.weights)}, averages {_bytes(memory.averages)}, optimizer "
        f"{_bytes(memory.moments)}, gradients {_bytes(memory.gradients)}, activations {_bytes(memory.activations)}",
    ]
    if plan.choices:
        lines += [*_choices(plan), ""]
    if plan.largest_batch is not None:
        model = plan.largest_model or "no preset"
        lines.append(f"fits         at most {plan.largest_batch:,} samples at once; {model} at this size and batch")
    basis = "measured operator by operator" if hardware.here else "estimated"
    lines += [
        f"speed        {plan.images_per_second:,.4g} images/s, {plan.step_seconds:.4g} s a step, "
        f"{plan.utilisation:.0%} of the matrix rate ({basis}"
        + ("; compiling is not counted" if hardware.here and work.compiled != "off" else "")
        + ")",
        f"time         {format_duration(plan.seconds)} training"
        + (f" (of it {format_duration(plan.encode_seconds * work.steps)} encoding)" if plan.encode_seconds else "")
        + f", {format_duration(plan.scoring_seconds)} for {work.drawing.grids:,} pictures in grids and {work.drawing.scored:,} "
        f"in {work.drawing.evaluations} evaluations: {format_duration(plan.all_seconds)} in all",
        f"cost         {plan.device_hours:.4g} device hours"
        + (f", ${plan.cost:,.2f} at ${hardware.price:g} an hour" if hardware.price else ""),
        f"disk         {_bytes(plan.disk_bytes)} for {work.checkpoints} checkpoints of {_bytes(plan.checkpoint_bytes)}"
        + _data(plan),
    ]
    if plan.budget is not None:
        bought = plan.budget
        lines.append(
            f"budget       {bought.text} buys {bought.steps:,} steps: {bought.samples:,} samples, {bought.flops:.4g} "
            "FLOPs" + ("" if bought.enough else f"; the run asks for {work.steps:,}")
        )
    lines += _optimal(plan, law)
    lines += [f"note         {note}" for note in plan.notes]
    return "\n".join(lines)


def _choices(plan: "Plan") -> list[str]:
    lines = ["", "             precision  recompute  shards  activations   at most  fits   images/s"]
    for choice in plan.choices:
        rate = "" if choice.step_seconds is None else f"{plan.work.batch / choice.step_seconds:,.4g}"
        own = (plan.precision, plan.work.recompute, plan.split.shards)
        mark = ">" if (choice.precision, choice.recompute, choice.shards) == own else " "
        lines.append(
            f"           {mark} {choice.precision:<9}  {choice.recompute:<9}  {choice.shards:>6}  "
            f"{_bytes(choice.memory.activations):>11}  {_bytes(choice.memory.at_most):>8}  "
            f"{'yes' if choice.fits else 'no':<4}  {rate:>9}".rstrip()
        )
    return lines


def _data(plan: "Plan") -> str:
    work = plan.work
    if work.images is None:
        each = f"{_bytes(work.latent_bytes)} of latents an image" if work.latent_bytes else ""
        return f"; data not counted{', ' + each if each else ''}"
    told = f"; {work.images:,} images, {_bytes(work.images * work.image_bytes)} as pixels"
    return told + (f", {_bytes(plan.latents_bytes or 0)} as cached latents" if work.latent_bytes else "")


def _optimal(plan: "Plan", law: "Law | None") -> list[str]:
    """What a law says of this compute: of what the budget buys, or of the whole run."""
    flops = plan.flops if plan.budget is None else plan.budget.flops
    if flops <= 0:
        return []
    if law is not None:
        best = law.optimal(flops)
        far = f", {best.beyond:.3g} times beyond what was measured" if best.beyond > 1 else ""
        return [
            f"optimal      by {law.source}: at {flops:.3g} FLOPs {best.gmacs:.3g} GMACs and {best.samples:,.0f} "
            f"samples ({best.samples / plan.work.batch:,.0f} steps of {plan.work.batch}); expected {law.metric} "
            f"{best.metric.value:.4g} ({best.metric.low:.4g} to {best.metric.high:.4g}){far}"
        ]
    from tessera.planning.budget import favoured

    return [f"optimal      {favoured(flops)}"]


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"
