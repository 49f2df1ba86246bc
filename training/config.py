"""What a run is beside its architecture, so that --resume by itself goes on with all of it. Stored in every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from common.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; all lengths are in images seen, so that batch size and resuming change nothing.

    patches: folder of patches. condition: see data.dataset.class_of. epochs: total, one epoch is as many images as there are
    training patches. lr_g, lr_d: Adam's learning rates. label_smoothing: real images get the target 1 - s. ema_half_life: images
    after which a weight counts half in the averaged generator. augmentation: strengths by kind. stain_normalize: none, macenko,
    reinhard.
    objective: one of models.losses.OBJECTIVES. r1, r2, gradient_penalty: weights of the penalties on D's gradient, taken every
    penalty_every steps and so much more strongly (lazy regularisation, Karras et al., StyleGAN2, 2020). perceptual: weight of the
    feature matching. grading: weight of labels being clear, see models.grader. adaptive: kinds of augmentation in front of D, []
    for none. warmup_images, lr_decay: see training.schedule.
    grow_images: length of a phase of progressive growing. betas: Adam's.
    save_every, sample_every, eval_every: epochs between numbered checkpoints, pictures, and scores; 0 for no scores, None for such
    as take little of the time. keep: how many numbered checkpoints stay, None for three. precision: of convolutions in training,
    float32 or bfloat16. auto_batch: whether batches are taken in parts when GPU memory is full. Raises UserError for grading
    without labels.
    """

    patches: str
    condition: str
    epochs: int = 200
    batch_size: int = 8
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    label_smoothing: float = 0.1
    ema_half_life: float = 5_000.0
    seed: int = 0
    augmentation: dict[str, float] = field(default_factory=dict)
    stain_normalize: str = "none"
    objective: str = "non_saturating"
    r1: float = 0.0
    r2: float = 0.0
    gradient_penalty: float = 0.0
    penalty_every: int = 8
    perceptual: float = 0.0
    grading: float = 0.0
    adaptive: list[str] = field(default_factory=list)
    warmup_images: int = 0
    lr_decay: str = "none"
    grow_images: int = 10_000
    betas: list[float] = field(default_factory=lambda: [0.5, 0.999])
    save_every: int = 10
    keep: int | None = None
    sample_every: int = 5
    eval_every: int | None = None
    precision: str = "float32"
    auto_batch: bool = False

    def __post_init__(self):
        if self.grading and self.condition == "none":
            raise UserError("--grading asks for clear labels and --condition none has none; leave one of them out")

    @property
    def teaches(self) -> bool:
        """Whether frozen features teach the generator."""
        return bool(self.perceptual or self.grading)

    def to_dict(self) -> dict:
        """Plain types only, for the checkpoint."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> TrainConfig:
        """Inverse of ``to_dict``. Raises UserError for a field that this version does not know."""
        unknown = set(values) - {item.name for item in fields(TrainConfig)}
        if unknown:
            raise UserError(
                f"the run's settings {sorted(unknown)} are unknown to this version; use the version it was trained with"
            )
        return TrainConfig(**values)
