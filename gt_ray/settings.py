"""The sections of the study config (config.py): every setting with its default, its bounds and what it means.
Those of fine-tunes are in fine_tune_settings.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gt_ray.fine_tune_settings import Mechanism, Section, mechanism_label

PopulationName = Literal["seen", "unseen_mixture", "unseen_composition", "small_data", "large_data"]


class DataSettings(Section):
    """Where the rows come from and how they are split."""

    source: Literal["embedded", "files", "hub"] = "hub"
    folder: Path | None = Field(None, description="source=files: holds <task>/*.jsonl in Hub columns")
    tasks: tuple[str, ...] = Field(("aqua_rat", "gsm8k", "commonsense_qa", "drop", "samsum", "dialogsum"), min_length=1)
    private_share: float = Field(0.5, gt=0, lt=1, description="share of the training rows that is private (section 6)")
    validation_share: float = Field(0.1, gt=0, lt=1, description="share of the public rows that validates")
    embedded_rows: int = Field(4096, ge=64, description="source=embedded: public training rows of a task")
    unseen_domains: int = Field(
        0, ge=0, le=1, description="source=embedded: domains of a task that no public row has, of each task another"
    )
    client_test_share: float = Field(0.1, gt=0, lt=1, description="share of a client's rows that tests (Table 2)")
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.source == "files" and self.folder is None:
            raise ValueError("data.source=files needs data.folder=<folder with one folder a task>")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"data.tasks={list(self.tasks)} names a task twice")
        return self


class CurationSettings(Section):
    """Shadows: how many, how large, how drawn (section 4.1)."""

    shadows: int = Field(300, ge=2)
    samples: int = Field(1024, ge=1, description="rows of a shadow")
    snapshots: int = Field(8, ge=1, description="updates kept of every run, the last among them")
    snapshot_spacing: int = Field(25, ge=1, description="optimizer steps between two snapshots")
    recipe: Literal["spaced", "paper"] = Field(
        "spaced", description="paper: keep the last 200 steps instead (section 6)"
    )
    plan: Literal["domains", "mixtures", "iid"] = Field(
        "domains",
        description="domains: task and domain first, then rows; mixtures: the same, and every other shadow mixes two "
        "domains; iid: rows of a task at random (the paper's)",
    )
    tinylm_shadows: int = Field(
        0, ge=0, description="further shadows of the TinyLM alone, for training on behaviour, which needs no LLM update"
    )
    tinylm_mechanisms: tuple[Mechanism, ...] = Field(
        (),
        description="learning mechanisms of the TinyLM's shadows, which take turns, so that they are like the clients; "
        "none: pair.tinylm.fine_tune.mechanism",
    )
    overlap: bool = Field(True, description="may two shadows share rows")
    seed: int = 0
    adapters_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="shadows that one worker trains together; auto: by memory and speed"
    )
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="most fine-tuning actors of a model; auto: by resources"
    )

    @property
    def snapshot_steps(self) -> tuple[int, ...]:
        """Optimizer steps from the end, largest first; the last is 0 (decision 4)."""
        if self.recipe == "paper":
            return tuple(reversed(range(200)))
        return tuple(j * self.snapshot_spacing for j in reversed(range(self.snapshots)))


class PhiSettings(Section):
    """The encoder-decoder: a T5 by Hub id or folder, or one from scratch by size."""

    pretrained: str | None = Field(None, description="Hub id or folder, e.g. google/flan-t5-large")
    d_model: int = Field(128, ge=8)
    layers: int = Field(2, ge=1, description="encoder layers, and as many decoder layers")
    heads: int = Field(4, ge=1)
    d_ff: int = Field(256, ge=8)
    dropout: float = Field(0.0, ge=0, lt=1)


class BehaviourSettings(Section):
    """Training on what generated adapters do: the task loss of the frozen LLM on the shadows' rows (decision 9)."""

    steps: int = Field(0, ge=0, description="optimizer steps after the epochs; 0: none, as in the paper")
    adapters: int = Field(8, ge=1, description="updates generated for one step, over all training workers")
    rows: int = Field(8, ge=1, description="rows that each of them is tried on")
    mix: float = Field(0.5, ge=0, le=1, description="share of the inputs that are mixtures of two")
    across: float = Field(
        0.0, ge=0, le=1, description="share of the inputs that are pooled over all tasks, for clients.joint=tasks"
    )
    across_pooling: Literal["mean", "sum"] = Field("mean", description="how they are pooled: as clients.pooling says")
    noise: float = Field(
        0.0,
        ge=0,
        description="largest size of Gaussian noise in half of the inputs, over that of updates: for clients, up to 5 "
        "of them pooled, whose mechanism adds noise that the shadows' does not, or less of it",
    )
    noise_shrinks: bool = Field(
        True, description="whether the signal shrinks as noise grows, as with AdamW; false: DP-SGD by plain steps (sgd)"
    )
    learning_rate: float = Field(1e-4, gt=0, description="of the network")
    linear_learning_rate: float = Field(3e-4, gt=0, description="of the linear path")
    teacher: float = Field(
        0.0, ge=0, le=1, description="share of the loss that is the divergence from proxy-tuning; needs one vocabulary"
    )
    average: float = Field(
        0.995,
        ge=0,
        lt=1,
        description="decay of the moving average of the weights over these steps, which is what is kept; 0: the last",
    )
    workers: int = Field(1, ge=1, description="LLM actors")


class TrainingSettings(Section):
    """How the Grad-Transformer is trained (section 4.2)."""

    epochs: int = Field(30, ge=0, description="of Eq. 10; 0: training on behaviour alone (recipe=paper: 30)")
    batch_size: int = Field(32, ge=1, description="tuples per optimizer step, over all workers")
    learning_rate: float = Field(5e-5, gt=0, description="the paper: 2e-5 to 8e-5")
    warmup_share: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    pool_max: int = Field(1, ge=1, description="N_max: a training input pools 1 to N_max shadows of one task")
    checkpoint_epochs: int = Field(1, ge=1, description="epochs between two checkpoints and validations")
    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(
        None,
        ge=1,
        description="go on with so few workers when nodes leave, take more as they come; none: `workers`",
    )
    num_gpus: float = Field(0, ge=0, description="GPUs of one training worker")
    num_cpus: float = Field(1, gt=0, description="CPUs of one training worker")
    strategy: Literal["ddp", "zero1", "zero2", "zero3"] = Field(
        "ddp",
        description="what the workers share out: nothing (ddp), or by DeepSpeed the optimizer's state (zero1), "
        "gradients too (zero2), weights too (zero3)",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of matrix products; weights are kept in float32")
    accumulation: int = Field(1, ge=1, description="passes that the batch of an optimizer step is cut into")
    activation_checkpointing: bool = Field(
        False, description="compute activations of a layer of phi again in the backward pass instead of keeping them"
    )
    compile: bool = Field(
        False, description="compile the layers of phi for Eq. 10: a minute once, then faster on a GPU; not with zero3"
    )
    offload: bool = Field(False, description="keep the optimizer's state in the machine's memory (zero1 to zero3)")
    tracking: Literal["tensorboard", "mlflow", "wandb"] = Field(
        "tensorboard", description="where measures go; mlflow and wandb by their own environment variables"
    )
    seed: int = 0
    behaviour: BehaviourSettings = BehaviourSettings()

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if not self.epochs and not self.behaviour.steps:
            raise ValueError("epochs=0 and behaviour.steps=0 leave nothing to train")
        if self.min_workers and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} are more than workers={self.workers}")
        if self.compile and self.strategy == "zero3":
            raise ValueError("compile=true gains nothing with strategy=zero3, which fetches weights inside of layers")
        if self.offload and self.strategy == "ddp":
            raise ValueError("offload=true needs strategy=zero1, zero2 or zero3")
        return self


class RefinementSettings(Section):
    """Optimizer steps on a generated adapter, towards the mean of itself and proxy-tuning (learning/refinement.py)."""

    steps: int = Field(0, ge=0, description="0: adapters stay as they were generated, as in the paper")
    rows: int = Field(16, ge=1, description="public rows of the client's task of a step")
    learning_rate: float = Field(2e-2, gt=0)
    near: float = Field(0.2, ge=0, le=1, description="share of proxy-tuning for a client as near as is usual")
    far: float = Field(0.9, ge=0, le=1, description="share of proxy-tuning for a client out of range")
    adapters: int = Field(8, ge=1, description="adapters refined in one pass")
    workers: int = Field(1, ge=1, description="actors with both models")


class GradTransformerSettings(Section):
    """The network and its training."""

    recipe: Literal["own", "paper"] = Field(
        "own",
        description="paper: no linear path, no mixtures, no behaviour loss, no refinement, whatever the other keys say",
    )
    phi: PhiSettings | None = Field(
        PhiSettings(pretrained="google/flan-t5-large"), description="none: no network, the linear path alone"
    )
    input_clip: float = Field(6.0, gt=0, description="standardised inputs are clipped to +- this (decision 7)")
    input_rank: int = Field(
        0,
        ge=0,
        description="directions in which kinds of shadows differ that inputs are projected to: noise of private "
        "clients in all other directions is not read; 0: no projection, as in the paper",
    )
    linear_rank: int = Field(
        0, ge=0, description="most principal components of the linear path; 0: no linear path, as in the paper"
    )
    chunk: int | None = Field(
        None,
        ge=8,
        description="coordinates of a token of phi: blocks are cut into chunks, whose ends do not grow with the LLM; "
        "none: a block is a token, as in the paper",
    )
    scale_floor: float = Field(0.1, ge=0, description="floor of a scale, as a share of its module's RMS (decision 7)")
    training: TrainingSettings = TrainingSettings()
    refinement: RefinementSettings = RefinementSettings()

    @model_validator(mode="before")
    @classmethod
    def _as_in_the_paper(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or tree.get("recipe") != "paper":
            return tree
        training = tree.get("training") or {}
        training = training if isinstance(training, dict) else training.model_dump()
        behaviour = training.get("behaviour") or {}
        behaviour = behaviour if isinstance(behaviour, dict) else behaviour.model_dump()
        plain = {**training, "pool_max": 1, "behaviour": {**behaviour, "steps": 0}}
        if not plain.get("epochs", 1):
            del plain["epochs"]
        return {**tree, "linear_rank": 0, "input_rank": 0, "training": plain, "refinement": {}}

    @model_validator(mode="after")
    def _check(self) -> GradTransformerSettings:
        if self.phi is None and not self.linear_rank:
            raise ValueError("phi=null leaves the linear path alone, but linear_rank=0 means that there is none")
        if self.phi is None and not self.training.behaviour.steps:
            raise ValueError("phi=null leaves the linear path alone, which is trained by training.behaviour.steps only")
        return self


class ClientSettings(Section):
    """The simulated organisations whose private data the provider never sees."""

    per_task: int = Field(5, ge=1, description="clients of a task in each population")
    populations: tuple[PopulationName, ...] = Field(
        ("seen",), min_length=1, description="kinds of clients (`gt_ray.tasks.populations`)"
    )
    samples: int | None = Field(None, ge=1, description="private rows of a client; none: all it has")
    same_domain: bool = Field(
        False, description="source=embedded: the clients of a task and population have one domain, of each task another"
    )
    mechanisms: tuple[Mechanism, ...] = Field(
        (), description="learning mechanisms by each of which a client fine-tunes; none: as the TinyLM's shadows"
    )
    joint: Literal["none", "task", "tasks"] = Field(
        "none",
        description="whose updates are pooled into one adapter: none: each client has its own (Table 1); task: the "
        "clients of a task and population (Table 2); tasks: a client of every task (Table 6)",
    )
    pooling: Literal["mean", "sum", "clip", "median", "trimmed_mean"] = Field(
        "mean", description="how (`gt_ray.updates.pooling`); sum is for clients of different tasks"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> ClientSettings:
        if len(set(labels := [mechanism_label(one) for one in self.mechanisms])) < len(labels):
            raise ValueError(f"mechanisms={labels} names one twice")
        if len(set(self.populations)) < len(self.populations):
            raise ValueError(f"populations={list(self.populations)} names a population twice")
        return self


class VllmSettings(Section):
    """One vLLM engine."""

    max_loras: int = Field(8, ge=1, description="adapters that share a batch; their slots lie on the GPU")
    max_lora_rank: int = Field(64, ge=1, le=512, description="adapters of a larger rank are refused")
    max_num_seqs: int = Field(256, ge=1, description="sequences of a batch")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that one engine is spread over")
    gpu_memory: float = Field(0.9, gt=0, le=1, description="share of a GPU's memory that an engine takes")
    cpu_cache_gb: int = Field(1, ge=1, description="key-value cache of an engine without a GPU, in GiB")


class WeakToStrongSettings(Section):
    """The baselines that fine-tune the LLM on what a fine-tuned TinyLM says (appendix C.2)."""

    alpha: float = Field(0.5, ge=0, le=1, description="conf: largest share of the LLM's own prediction (Eq. 47)")
    warmup: float = Field(0.2, ge=0, le=1, description="conf: share of the steps in which it grows from 0")
    temperature: float = Field(2.0, gt=0, description="vissup: of the weak term (Eq. 48)")
    top_k: int = Field(
        20, ge=1, description="conf, vissup: likeliest tokens that are kept of a distribution; the others count as one"
    )


class EvaluationSettings(Section):
    """What is scored and how."""

    engine: Literal["auto", "vllm", "transformers"] = Field("auto", description="auto: vLLM where it is installed")
    test_rows: int | None = Field(None, ge=1, description="test rows of a client; none: all it has")
    batch_size: int = Field(32, ge=1, description="test rows of a batch (engine=transformers)")
    max_new_tokens: int = Field(512, ge=1)
    max_model_len: int = Field(4096, ge=8, description="window in tokens, where the model's own is not smaller")
    controls: bool = Field(True, description="score the controls of DESIGN.md section 6")
    baselines: tuple[Literal["w2s", "conf", "vissup", "proxy_tuning", "cross_lora", "oracle_domain"], ...] = Field(
        (),
        description="methods without a Grad-Transformer to score: w2s, conf and vissup, which read private data; "
        "proxy_tuning (this one, conf and vissup need one vocabulary of both models); cross_lora, which needs "
        "lora.kind=lora; oracle_domain, the mean T update of a client's true domain, a ceiling",
    )
    weak_to_strong: WeakToStrongSettings = WeakToStrongSettings()
    workers: int = Field(1, ge=1, description="engines of a model")
    num_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto", description="GPUs of one engine; auto: one, or vllm.tensor_parallel, where the cluster has GPUs"
    )
    log_likelihood: bool = Field(True, description="log-likelihoods of the references too: a forward pass more a row")
    vllm: VllmSettings = VllmSettings()

    @model_validator(mode="after")
    def _check(self) -> EvaluationSettings:
        if self.max_new_tokens >= self.max_model_len:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for a prompt within "
                f"max_model_len={self.max_model_len}"
            )
        if self.vllm.tensor_parallel > 1 and self.num_gpus not in ("auto", self.vllm.tensor_parallel):
            raise ValueError(
                f"vllm.tensor_parallel={self.vllm.tensor_parallel} needs num_gpus=auto, not {self.num_gpus}"
            )
        return self
