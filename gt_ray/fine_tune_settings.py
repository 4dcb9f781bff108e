"""The sections of the study config that say how a model of the pair is fine-tuned, and by which learning mechanism."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator


class Section(BaseModel):
    """A part of the config: unknown keys are errors, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LoraSettings(Section):
    """What every fine-tune of a model trains (appendix C.1: LoRA of rank 2 on query and key)."""

    kind: Literal["lora", "xs", "full"] = Field(
        "lora",
        description="lora: A and B; xs: an r x r matrix between A and B of the base weights' SVD (LoRA-XS); full: the "
        "weights themselves, of small models",
    )
    rank: int = Field(2, ge=1, description="not of kind=full")
    alpha: float = Field(4.0, gt=0, description="not of kind=full")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj"),
        min_length=1,
        description="last parts of the names of Linear modules, or of the token embedding",
    )


class StopSettings(Section):
    """When a fine-tune ends: after `fine_tune.steps`, or "until convergence" (section 4.1)."""

    when: Literal["steps", "plateau"] = Field(
        "steps",
        description="steps: linear decay over all steps; plateau: constant rate until a held-out public loss stands "
        "still, then a linear decay; fine_tune.steps is the cap. Not with a private mechanism: it would look at data",
    )
    every: int = Field(100, ge=1, description="optimizer steps between two looks at the held-out loss")
    patience: int = Field(3, ge=1, description="looks without improvement that make a plateau")
    min_improvement: float = Field(0.01, ge=0, lt=1, description="share of the loss that counts as improvement")
    decay_steps: int = Field(200, ge=1, description="steps of the decay; the snapshots lie within them")
    held_out: int = Field(64, ge=1, description="public rows that the loss is computed on")


class MechanismSettings(Section):
    """What a learning mechanism other than plain fine-tuning may have of its own."""

    steps: int | None = Field(None, ge=1, description="optimizer steps, in place of fine_tune.steps")
    batch_size: int | None = Field(None, ge=1, description="in place of fine_tune.batch_size")
    learning_rate: float | None = Field(None, gt=0, description="in place of fine_tune.learning_rate")


class DpSgdSettings(MechanismSettings):
    """DP-SGD (Algorithm 1, appendix D): (epsilon, delta)-differential privacy of every row."""

    name: Literal["dp_sgd"] = "dp_sgd"
    epsilon: float | None = Field(4.0, gt=0, description="of the whole fine-tune; the noise follows from it")
    delta: float = Field(1e-5, gt=0, lt=1)
    noise_multiplier: float | None = Field(
        None, ge=0, description="in place of epsilon, and without any promise: for shadows, whose rows are public"
    )
    row_norm: float = Field(0.1, gt=0, description="bound of the norm of a row's gradient (C)")
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw",
        description="sgd: plain steps at a constant rate, in which every noisy gradient counts alike: where noise is "
        "large the update tells more of the data",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("noise_multiplier") is not None:
            return {"epsilon": None, **tree}
        return tree

    @model_validator(mode="after")
    def _check(self) -> DpSgdSettings:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("epsilon and noise_multiplier say the same; give one of them")
        return self


class NoisyErmSettings(MechanismSettings):
    """Gaussian noise on the result of plain fine-tuning (section 5)."""

    name: Literal["noisy_erm"] = "noisy_erm"
    noise: float = Field(gt=0, description="standard deviation of the noise on each number of the update")
    update_norm: float | None = Field(
        None, gt=0, description="bound of the update's norm; with it the noise hides the whole data set, not one row"
    )


class GibbsSettings(MechanismSettings):
    """A sample of the Gibbs distribution by stochastic gradient Langevin dynamics (section 5)."""

    name: Literal["gibbs"] = "gibbs"
    temperature: float = Field(gt=0, description="of the distribution, in units of the mean loss a target token")


def _mechanism_name(value: Any) -> Any:
    if isinstance(value, str):
        return "sft" if value == "sft" else None
    return value.get("name") if isinstance(value, dict) else getattr(value, "name", None)


Mechanism = Annotated[
    Annotated[Literal["sft"], Tag("sft")]
    | Annotated[DpSgdSettings, Tag("dp_sgd")]
    | Annotated[NoisyErmSettings, Tag("noisy_erm")]
    | Annotated[GibbsSettings, Tag("gibbs")],
    Discriminator(
        _mechanism_name,
        custom_error_type="mechanism",
        custom_error_message="a learning mechanism is sft, {name: dp_sgd, epsilon: 1}, {name: noisy_erm, noise: 0.01} "
        "or {name: gibbs, temperature: 1e-5}",
    ),
]


def mechanism_label(mechanism: Mechanism) -> str:
    """A mechanism in two words for tables: `sft`, `epsilon 4`, `noise 0.01`, `temperature 1e-05`."""
    if isinstance(mechanism, str):
        return mechanism
    told = {"dp_sgd": "epsilon", "noisy_erm": "noise", "gibbs": "temperature"}[mechanism.name]
    if isinstance(mechanism, DpSgdSettings) and mechanism.epsilon is None:
        told = "noise_multiplier"
    return f"{told} {getattr(mechanism, told):g}"


class FineTuneSettings(Section):
    """How a model is fine-tuned on one data set; the defaults are Table 5."""

    steps: int = Field(20000, ge=1, description="optimizer steps; the cap where stop.when=plateau")
    stop: StopSettings = StopSettings()
    learning_rate: float = Field(1e-5, gt=0, description="peak of the linear schedule")
    batch_size: int = Field(16, ge=1, description="samples per optimizer step (the paper: 1 x 16 accumulated)")
    clip_norm: float = Field(0.1, gt=0, description="gradient clipping norm")
    weight_decay: float = Field(0.01, ge=0)
    max_length: int = Field(4096, ge=8, description="tokens; longer samples are errors")
    mechanism: Mechanism = Field("sft", description="sft, or `{name: dp_sgd, epsilon: 1}`, noisy_erm, gibbs")

    @property
    def mechanism_name(self) -> str:
        """Name of the learning mechanism."""
        return self.mechanism if isinstance(self.mechanism, str) else self.mechanism.name

    def by(self, mechanism: Mechanism) -> FineTuneSettings:
        """The same fine-tune by another mechanism, with what that has of its own."""
        return FineTuneSettings.model_validate({**self.model_dump(), "mechanism": mechanism})

    @property
    def last_steps(self) -> int:
        """Optimizer steps, counted from the end, of which snapshots can be kept."""
        return self.stop.decay_steps if self.stop.when == "plateau" else self.steps

    @model_validator(mode="before")
    @classmethod
    def _of_mechanism(cls, tree: Any) -> Any:
        """A mechanism's own steps, batch size and rate take the place of the fine-tune's."""
        mechanism = tree.get("mechanism") if isinstance(tree, dict) else None
        if isinstance(mechanism, MechanismSettings):
            mechanism = mechanism.model_dump()
        if not isinstance(mechanism, dict):
            return tree
        own = {key: mechanism[key] for key in MechanismSettings.model_fields if mechanism.get(key) is not None}
        rest = {key: value for key, value in mechanism.items() if key not in MechanismSettings.model_fields}
        return {**tree, **own, "mechanism": rest}

    @model_validator(mode="after")
    def _check(self) -> FineTuneSettings:
        if self.stop.when == "plateau" and self.mechanism != "sft":
            raise ValueError("stop.when=plateau looks at data that the mechanism does not protect; use steps")
        if self.stop.when == "plateau" and self.stop.every + self.stop.decay_steps > self.steps:
            raise ValueError(
                f"steps={self.steps} is fewer than one look at the held-out loss and the decay after it "
                f"(stop.every={self.stop.every} + stop.decay_steps={self.stop.decay_steps})"
            )
        return self


class ModelSettings(Section):
    """One model of the pair."""

    model: str = Field(description="Hub id, folder, or `embedded:tinylm`, `embedded:llm`")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    lora: LoraSettings = LoraSettings()
    root_seed: int = Field(0, description="seed that draws A0")
    fine_tune: FineTuneSettings = FineTuneSettings()
    gradient_checkpointing: bool = Field(False, description="less memory for a fine-tune, a third more computing")
    num_gpus: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="GPUs of one curation worker, of one LLM actor; auto: by the model's size, none where the cluster "
        "has none; over more than one, whole ones of one node, the model's layers are spread",
    )


class PairSettings(Section):
    """The TinyLM (S) that clients fine-tune and the LLM (T) that they want."""

    tinylm: ModelSettings
    llm: ModelSettings
