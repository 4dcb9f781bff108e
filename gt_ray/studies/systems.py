"""The systems of a study: what is scored on whose test rows (DESIGN.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gt_ray.baselines.controls import CONTROLS, Shadows, ShadowSet, oracle_domain
from gt_ray.baselines.cross_lora import CrossLora
from gt_ray.baselines.proxy_tuning import share_vocabulary
from gt_ray.curation.jobs import Side, client_job
from gt_ray.curation.study import Study
from gt_ray.evaluation.scorer import System
from gt_ray.grad_transformer.network import GradTransformer
from gt_ray.learning.refinement import proxy_share
from gt_ray.progress import say
from gt_ray.studies.weak_to_strong import strong_jobs
from gt_ray.tasks.data import Client, Group
from gt_ray.training.refinement import Generated, Proxy, refine_all
from gt_ray.training.run import LINEAR, load_trained, models
from gt_ray.updates.files import read_adapter
from gt_ray.updates.pooling import pool, pool_products


@dataclass(frozen=True)
class Pooled:
    """The S updates [N, L, d] of a group's clients, and what they are pooled to [L, d]."""

    group: Group
    updates_NLd: Tensor
    update_Ld: Tensor

    def by_task(self) -> list[tuple[str, Tensor]]:
        """What proxy-tuning of each task wears: what they are pooled to, or where tasks differ the mean of its own
        clients."""
        if len(self.group.tasks) == 1:
            return [(self.group.tasks[0], self.update_Ld)]
        of_task = [[client.task == task for client in self.group.members] for task in self.group.tasks]
        return [(task, self.updates_NLd[own].mean(0)) for task, own in zip(self.group.tasks, of_task, strict=True)]


def systems(study: Study, model: GradTransformer, pooled: Mapping[str, Pooled]) -> list[tuple[System, Client]]:
    """What is scored on whose test rows."""
    run, store, settings = study.config.run_folder, study.store, study.config.evaluation
    llm = study.roots["llm"]
    shadows = load_shadows(study, model) if settings.controls or "oracle_domain" in settings.baselines else None
    public = {job.task: store.read(job.key)[0][-1] for job in study.public_jobs()} if settings.controls else {}
    refines = study.config.grad_transformer.refinement.steps > 0
    linear = load_trained(study, LINEAR) if settings.controls and LINEAR in models(study) else None
    variants = _variants(study, model, pooled)
    of_linear = generated_updates(study, linear, pooled) if linear else {}
    of_linear_refined = finished_updates(study, of_linear) if refines else {}
    pair = study.config.pair
    proxy = "proxy_tuning" in settings.baselines
    if proxy and not share_vocabulary(pair.tinylm.model, pair.llm.model):
        say("evaluate: no proxy_tuning, for the models' vocabularies differ")
        proxy = False
    carry = _cross_lora(study)
    own = dict(zip([client.name for client in study.data.clients], study.client_jobs("llm"), strict=True))
    plain = plain_systems(study)
    strong = strong_jobs(study)
    work = []
    for name, one in pooled.items():
        z_S_P = model.standard_S(one.update_Ld).flatten()
        adapter_Ld = read_adapter(run / "adapters" / name, llm)
        carried_Ld = carry(one.update_Ld) if carry else None
        for client in one.group.members:
            found = [load_plain(study, system, plain[client.name][system]) for system in plain[client.name]]
            found += [
                System("ours", "llm", adapter_Ld),
                *(System(variant, "llm", updates[client.name]) for variant, updates in variants.items()),
            ]
            found += [System(name, "llm", store.read(job.key)[0][-1]) for name, job in strong[client.name].items()]
            if proxy:
                found.append(System("proxy_tuning", proxy_Ld=dict(one.by_task())[client.task]))
            if carried_Ld is not None:
                found.append(System("cross_lora", "llm", carried_Ld))
            if len(one.group.members) > 1:
                alike = [other for other in one.group.members if other.task == client.task]
                mean_Ld = torch.stack([store.read(own[other.name].key)[0][-1] for other in alike]).mean(0)
                found.append(System("P_T_mean", "llm", mean_Ld))
            if shadows and "oracle_domain" in settings.baselines:
                oracle_Ld = oracle_domain(shadows, client.task, client.domain)
                found += [] if oracle_Ld is None else [System("oracle_domain", "llm", oracle_Ld)]
            if shadows and settings.controls:
                found.append(System("public_sft", "llm", public[client.task]))
                found += [
                    System(control, "llm", predict(shadows, z_S_P, client.task))
                    for control, predict in CONTROLS.items()
                ]
            if of_linear:
                found.append(System(LINEAR, "llm", of_linear[name].update_Ld))
            if of_linear_refined:
                found.append(System(f"{LINEAR}_refined", "llm", of_linear_refined[name]))
            work += [(system, client) for system in found]
    return work


def plain_systems(study: Study) -> dict[str, dict[str, tuple[Side, str | None]]]:
    """By client, what is scored whatever the Grad-Transformer is: model, and unit of its fine-tune if it has one."""
    own, ceilings = study.client_jobs("tinylm"), study.ceiling_jobs()
    return {
        client.name: {
            "P_S": ("tinylm", job.key),
            "base_S": ("tinylm", None),
            "P_T": ("llm", ceilings[client.name].key),
            "base_T": ("llm", None),
        }
        for client, job in zip(study.data.clients, own, strict=True)
    }


def load_plain(study: Study, name: str, made_of: tuple[Side, str | None]) -> System:
    """One of the `plain_systems`, with the update of its unit."""
    side, key = made_of
    return System(name, side, study.store.read(key)[0][-1] if key else None)


def _cross_lora(study: Study) -> CrossLora | None:
    """What carries updates over by weights alone, where the study asks for it and has adapters of its kind."""
    if "cross_lora" not in study.config.evaluation.baselines:
        return None
    if not all(root.has_factors for root in study.roots.values()):
        say("evaluate: no cross_lora, which carries over LoRA of Linear modules alone (lora.kind=lora)")
        return None
    return CrossLora.of(study.config.pair, study.roots["tinylm"], study.roots["llm"])


def _variants(study: Study, model: GradTransformer, pooled: Mapping[str, Pooled]) -> dict[str, dict[str, Tensor]]:
    """By name and client, LLM updates that differ from ours in one thing: not refined, each client by itself, pooled by
    products instead of factors."""
    found = {}

    def add(variant: str, inputs: Mapping[str, Pooled], refined: bool) -> None:
        generated = generated_updates(study, model, inputs)
        finished = finished_updates(study, generated) if refined else {n: g.update_Ld for n, g in generated.items()}
        found[variant] = {client.name: finished[n] for n, one in inputs.items() for client in one.group.members}

    if study.config.grad_transformer.refinement.steps:
        add("ours_unrefined", pooled, refined=False)
    if study.config.clients.joint != "none":
        alone = {
            client.name: Pooled(Group(client.name, (client,)), update_Ld[None], update_Ld)
            for one in pooled.values()
            for client, update_Ld in zip(one.group.members, one.updates_NLd, strict=True)
        }
        add("ours_alone", alone, refined=True)
        if (root := study.roots["tinylm"]).has_factors:
            products = {n: replace(one, update_Ld=pool_products(one.updates_NLd, root)) for n, one in pooled.items()}
            add("ours_product", products, refined=True)
    return found


def pooled_updates(study: Study, model: GradTransformer) -> dict[str, Pooled]:
    """By group, its clients' S updates and what they are pooled to."""
    found = {}
    for group in study.groups():
        jobs = [client_job(study.config, study.data, study.roots["tinylm"], "tinylm", one) for one in group.members]
        updates_NLd = torch.stack([study.store.read(job.key)[0][-1] for job in jobs])
        update_Ld = pool(updates_NLd, study.config.clients.pooling, model.standard_S.mean)
        found[group.name] = Pooled(group, updates_NLd, update_Ld)
    return found


def generated_updates(study: Study, model: GradTransformer, pooled: Mapping[str, Pooled]) -> dict[str, Generated]:
    """What a model generates from each of these."""
    found, generator = {}, model.fingerprint()
    for name, one in pooled.items():
        update_Ld = model.generate(one.update_Ld[None])[0]
        proxies = tuple(Proxy(task, own_Ld, share_of_proxy(study, model, own_Ld)) for task, own_Ld in one.by_task())
        found[name] = Generated(generator, update_Ld, one.update_Ld, proxies)
    return found


def finished_updates(study: Study, generated: dict[str, Generated]) -> dict[str, Tensor]:
    """By client, what becomes of generated updates: refined where the study says so."""
    if not study.config.grad_transformer.refinement.steps:
        return {name: one.update_Ld for name, one in generated.items()}
    return dict(zip(generated, refine_all(study, list(generated.values())), strict=True))


def share_of_proxy(study: Study, model: GradTransformer, update_S_Ld: Tensor) -> float:
    estimate, settings = model.estimate(update_S_Ld), study.config.grad_transformer.refinement
    return proxy_share(estimate.distance if estimate else None, estimate.range if estimate else 1.0, settings)


def load_shadows(study: Study, model: GradTransformer) -> Shadows:
    """The last updates of all shadows, standardised as the Grad-Transformer's input is."""
    jobs = {side: study.shadow_jobs(side) for side in study.roots}

    def last(side: Side, numbers: list[int]) -> Tensor:
        return torch.stack([study.store.read(jobs[side][i].key)[0][-1] for i in numbers])

    def of(numbers: list[int], with_llm: bool) -> ShadowSet:
        return ShadowSet(
            last("llm", numbers) if with_llm else torch.empty(len(numbers), 0, 0),
            model.standard_S(last("tinylm", numbers)).flatten(1),
            [study.shadows[i].task for i in numbers],
            [study.shadows[i].domain for i in numbers],
        )

    training = [i for i, shadow in enumerate(study.shadows) if not shadow.validation]
    pairs = [i for i in training if not study.shadows[i].tinylm_only]
    validation = [i for i, shadow in enumerate(study.shadows) if shadow.validation]
    root_P = model.standard_S(torch.zeros_like(model.standard_S.mean)).flatten()
    return Shadows(of(pairs, True), of(validation, True), of(training, False), root_P)
