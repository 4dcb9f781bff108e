"""The baselines of appendix C.2 in a study: weak fine-tunes, labels, strong fine-tunes.

They hand a client's rows to the LLM, so differential privacy means nothing to them. They are made once for a client's
rows, by plain fine-tuning, and shown beside each of its mechanisms, as the ceiling P_T is; a client that is joint with
others has its own.
"""

from __future__ import annotations

from dataclasses import replace

from gt_ray.baselines.proxy_tuning import share_vocabulary
from gt_ray.baselines.weak_to_strong import LOSSES, WEAK_TO_STRONG, asked_for, made_of
from gt_ray.curation.jobs import FineTuneJob, strong_job
from gt_ray.curation.run import run_fine_tunes
from gt_ray.curation.study import Study
from gt_ray.errors import UserError
from gt_ray.evaluation.labels import labelled, unlabelled, weak_distributions, weak_outputs
from gt_ray.progress import say
from gt_ray.tasks import Row
from gt_ray.tasks.data import Client, TaskData


def possible(study: Study) -> list[str]:
    """Those of them that the pair allows: distributions take one vocabulary of both models."""
    names, pair = asked_for(study.config), study.config.pair
    if LOSSES.keys() & set(names) and not share_vocabulary(pair.tinylm.model, pair.llm.model):
        return [name for name in names if name not in LOSSES]
    return names


def strong_jobs(study: Study) -> dict[str, dict[str, FineTuneJob]]:
    """The LLM's fine-tunes by client and baseline."""
    config, names = study.config, possible(study)

    def jobs(client: Client) -> dict[str, FineTuneJob]:
        labels = unlabelled(study, client).key if names else ""
        made = {name: {"labels": labels, **made_of(name, config.evaluation.weak_to_strong)} for name in names}
        return {
            name: strong_job(config, study.data, study.roots["llm"], client, name, content)
            for name, content in made.items()
        }

    return {client.name: jobs(client) for client in study.data.clients}


def run_baselines(study: Study) -> None:
    """Make all LLM updates of these baselines that the store lacks.

    Raises:
        UserError: the study asks for none of them, or a client has too few rows.
    """
    if not asked_for(study.config):
        raise UserError(
            f"evaluation.baselines asks for none of {', '.join(WEAK_TO_STRONG)}; add for instance "
            "evaluation.baselines=[w2s]"
        )
    if left_out := [name for name in asked_for(study.config) if name not in possible(study)]:
        say(f"baselines: no {' and '.join(left_out)}, for the models' vocabularies differ")
    jobs = [job for own in strong_jobs(study).values() for job in own.values()]
    if study.store.missing(list({job.key for job in jobs})):
        study = _with_labels(study)
    run_fine_tunes(study, jobs, "baselines")


def _with_labels(study: Study) -> Study:
    """The study with a pool (task, baseline) beside each (task, "private"), in which second halves have labels."""
    wanted = list({one.key: one for one in (unlabelled(study, client) for client in study.data.clients)}.values())
    run_fine_tunes(study, [one.weak for one in wanted], "baselines, weak models")
    outputs = weak_outputs(study, wanted)
    settings = study.config.evaluation.weak_to_strong
    kept = {name: made_of(name, settings).get("distributions") for name in possible(study)}
    distributions = iter(
        weak_distributions(study, [(one, how) for how in kept.values() if how for one in wanted], outputs)
    )
    pools: dict[tuple[str, str], list[Row]] = {}
    for name, how in kept.items():
        for one in wanted:
            rows = labelled(one.rows, outputs[one.key], next(distributions) if how else None)
            pool = pools.setdefault((one.task, name), list(study.data.pools[one.task, "private"]))
            for i, row in zip(one.positions, rows, strict=True):
                pool[i] = row
    return replace(study, data=TaskData({**study.data.pools, **pools}, study.data.clients))
