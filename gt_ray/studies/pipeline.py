"""The main job: curate, train, fine-tune clients, generate, score, report. Every stage skips what is done."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gt_ray.baselines.weak_to_strong import asked_for
from gt_ray.config import Config, FineTuneSettings
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study, load_roots, root_file
from gt_ray.errors import UserError
from gt_ray.evaluation.run import score
from gt_ray.evaluation.summary import by_population, report_rows, summarise
from gt_ray.grad_transformer.generate import generate_adapter
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.learning.mechanisms import statement
from gt_ray.progress import say
from gt_ray.studies.clock import devices_of_engines, devices_of_refinement, devices_of_training, timed, times
from gt_ray.studies.systems import Pooled, finished_updates, generated_updates, pooled_updates, share_of_proxy, systems
from gt_ray.studies.weak_to_strong import run_baselines
from gt_ray.tasks.data import Client
from gt_ray.training.refinement import Generated, Proxy, are_refined, refine_all
from gt_ray.training.run import MODEL, load_trained, models, train
from gt_ray.updates.files import read_adapter, write_atomically
from gt_ray.updates.pooling import Pooling
from gt_ray.updates.update_files import UpdateInfo, write_update


def prepare(config: Config) -> Study:
    """Check the input, open the run folder and save the config and the units' keys beside what they produce."""
    study = Study.load(config)
    run = config.run_folder
    keys = {
        side: list(dict.fromkeys(job.key for one in study.pairs for job in one.shadow_jobs(side)))
        for side in study.roots
    }
    write_atomically(run / "config.yaml", config.to_yaml().encode())
    write_atomically(run / "units.json", json.dumps(keys).encode())
    for side, root in study.roots.items():
        root.save(root_file(run, side))  # who serves the run needs no base models
    return study


def curate_stage(study: Study) -> None:
    """Section 4.1: both models of every pair on every shadow; what two pairs need is there for the second."""
    with timed(study, "curate"):
        for one in (study, *study.further):
            run_fine_tunes(one, [*one.shadow_jobs("llm"), *one.shadow_jobs("tinylm")], "curate")


def train_stage(study: Study) -> None:
    """Section 4.2."""
    for name in models(study):
        with timed(study, "train" if name == MODEL else "train_controls", devices_of_training):
            train(study, name)


def generate_stage(study: Study) -> None:
    """Section 4.3 for the simulated clients: private fine-tune, update file, generation, LLM adapter."""
    run = study.config.run_folder
    model = load_trained(study)
    with timed(study, "clients"):
        jobs = study.client_jobs("tinylm")
        run_fine_tunes(study, jobs, "clients")
        for client, job in zip(study.data.clients, jobs, strict=True):
            fine_tune = FineTuneSettings.model_validate(job.made_by["fine_tune"])
            snapshots_JLd, meta = study.store.read(job.key)
            told = fine_tune.model_dump(mode="json", exclude={"mechanism"})
            info = UpdateInfo(told, meta.samples, statement(fine_tune, meta.samples))
            write_update(update_file(run, client), snapshots_JLd[-1], study.roots["tinylm"], info)
    with timed(study, "generate", devices_of_refinement):
        refines = study.config.grad_transformer.refinement.steps > 0
        generated = generated_updates(study, model, pooled_updates(study, model)) if refines else {}
        refined = finished_updates(study, generated) if refines else {}
        checkpoint = model.fingerprint()
        for group in study.groups():
            generate_adapter(
                model,
                study.roots["tinylm"],
                study.roots["llm"],
                [update_file(run, client) for client in group.members],
                run / "adapters" / group.name,
                study.config.clients.pooling,
                refine=_known(refined[group.name]) if refined else None,
                checkpoint=checkpoint,
            )


def _known(refined_Ld: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda _update_S_Ld, _update_Ld: refined_Ld


def generate_files(
    config: Config, updates: Sequence[Path], out: Path, pooling: Pooling, task: str | None = None
) -> None:
    """Section 4.3 for clients that are not simulated: pool their update files, write one LLM adapter.

    Args:
        task: of the clients; refinement needs public rows of it.

    Raises:
        UserError: the config asks for refinement, but not for one of its tasks.
    """
    model = GradTransformer.load(config.run_folder / "grad_transformer")
    refine = None
    if config.grad_transformer.refinement.steps:
        if task not in config.data.tasks:
            raise UserError(
                f"which task do the clients have? --task is one of {', '.join(config.data.tasks)}; refinement needs "
                "public rows of it (grad_transformer.refinement.steps=0: none)"
            )
        study = Study.load(config)

        def refine(update_S_Ld: Tensor, update_Ld: Tensor) -> Tensor:
            proxy = Proxy(task, update_S_Ld, share_of_proxy(study, model, update_S_Ld))
            return refine_all(study, [Generated(model.fingerprint(), update_Ld, update_S_Ld, (proxy,))])[0]

    roots = load_roots(config)
    estimate = generate_adapter(model, roots["tinylm"], roots["llm"], updates, out, pooling, refine)
    say(f"generate: {len(updates)} update(s) to {out}")
    if estimate:
        say(estimate.text)


def baselines_stage(study: Study) -> None:
    """Appendix C.2: the LLM fine-tuned on labels of clients' weak models (w2s, conf, vissup)."""
    with timed(study, "baselines", devices_of_engines):
        run_baselines(study)


def evaluate_stage(study: Study) -> dict[str, Any]:
    """Ceilings, controls, baselines, scores; writes and returns `report.json`."""
    model = load_trained(study)
    pooled = pooled_updates(study, model)
    _check_adapters(study, model, pooled)
    with timed(study, "ceilings"):
        extra = study.public_jobs() if study.config.evaluation.controls else []
        # Those of single clients too where they are joint: their mean is not the fine-tune on the union.
        ceilings = [*study.ceiling_jobs().values(), *study.client_jobs("llm"), *extra]
        run_fine_tunes(study, ceilings, "ceilings")
    if asked_for(study.config):
        baselines_stage(study)
    with timed(study, "evaluate", devices_of_engines):
        results = score(study, systems(study, model, pooled))
    config, known, populations = study.config, certainty(model, pooled), by_population(results)
    for name, summary in populations.items():
        if flags := [one["out_of_range"] for one in known.values() if one["population"] == name]:
            summary["average"]["out_of_range"] = 100 * sum(flags) / len(flags)
    report = {
        "preset": config.preset,
        "seed": config.seed,
        "pair": {side: {"model": root.base_model, "root": root.hash} for side, root in study.roots.items()},
        **times(study, ceilings),
        "rows": report_rows(results, config.seed),
        "summary": summarise(results),
        "populations": populations,
        "certainty": known,
    }
    write_atomically(config.run_folder / "report.json", json.dumps(report, indent=1).encode())
    from gt_ray.studies.report import write_html

    write_html(config.run_folder)
    return report


def certainty(model: GradTransformer, pooled: Mapping[str, Pooled]) -> dict[str, dict[str, Any]]:
    """What is known of the error of each client's adapter before it is scored."""
    found = {}
    for one in pooled.values():
        if estimate := model.estimate(one.update_Ld):
            known = {name: value for name, value in asdict(estimate).items() if value is not None}
            for client in one.group.members:
                found[client.name] = {"population": client.kind, **known, "out_of_range": estimate.out_of_range}
    return found


def _check_adapters(study: Study, model: GradTransformer, pooled: Mapping[str, Pooled]) -> None:
    """Every client has the adapter that this study's Grad-Transformer makes of this study's client.

    Checked before hours of ceilings.

    Raises:
        UserError: an earlier stage has not run, or has run with other settings.
    """
    run, generated = study.config.run_folder, generated_updates(study, model, pooled)
    refines = study.config.grad_transformer.refinement.steps > 0
    if refines and not are_refined(study, list(generated.values())):
        raise UserError(f"the adapters in {run / 'adapters'} are not refined as this study says; run generate again")
    for name, expected_Ld in finished_updates(study, generated).items():
        folder = run / "adapters" / name
        adapter_Ld = read_adapter(folder, study.roots["llm"])
        if not torch.allclose(adapter_Ld, expected_Ld, rtol=1e-3, atol=1e-4):
            raise UserError(f"{folder} was generated by a run with other settings; run generate again")


def pipeline(config: Config) -> dict[str, Any]:
    """All stages; returns the report."""
    study = prepare(config)
    curate_stage(study)
    train_stage(study)
    generate_stage(study)
    return evaluate_stage(study)


def update_file(run: Path, client: Client) -> Path:
    """Where a simulated client's update file lies."""
    return run / "clients" / f"{client.name}.safetensors"
