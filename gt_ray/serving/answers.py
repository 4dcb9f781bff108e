"""A generated update as what a client gets: a zipped PEFT folder, or an update file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from torch import Tensor

from gt_ray.grad_transformer.certainty import Estimate
from gt_ray.grad_transformer.generate import card
from gt_ray.serving.checkpoints import Description
from gt_ray.serving.problems import ProblemError
from gt_ray.updates.files import adapter_files, check_finite
from gt_ray.updates.update_files import UpdateInfo, update_bytes

MediaType = Literal["application/zip", "application/octet-stream"]
ZIP: Final = "application/zip"
UPDATE_FILE: Final = "application/octet-stream"
NO_ADAPTER = f"updates of full weights are no adapter; accept {UPDATE_FILE}"


@dataclass(frozen=True)
class Answer:
    """A generated update and where it comes from.

    Attributes:
        infos: of the clients' updates.
    """

    update_T_Ld: Tensor
    estimate: Estimate | None
    checkpoint: Description
    infos: Sequence[UpdateInfo]
    pooling: str

    @property
    def headers(self) -> dict[str, str]:
        """Checkpoint and certainty, beside the body."""
        one = self.checkpoint
        known = asdict(self.estimate) | {"out_of_range": self.estimate.out_of_range} if self.estimate else {}
        return {
            "Gt-Ray-Checkpoint": f"{one.name} {one.version} {one.sha256}",
            "Gt-Ray-Estimate": json.dumps(known),
        }

    def content(self, media_type: MediaType) -> bytes:
        """The body.

        Raises:
            UserError: the generated update is not finite.
            ProblemError: 406, full weights as a zipped adapter.
        """
        llm, tinylm = self.checkpoint.roots["llm"], self.checkpoint.roots["tinylm"]
        check_finite(self.update_T_Ld, "the generated update")
        if media_type == UPDATE_FILE:
            mechanism = {"name": "generated", "checkpoint": self.checkpoint.sha256}
            samples = sum(info.samples for info in self.infos)
            return update_bytes(self.update_T_Ld, llm, UpdateInfo({}, samples, mechanism))
        if llm.lora.kind == "full":
            raise ProblemError(406, NO_ADAPTER)
        text = card(self.infos, tinylm, llm, self.pooling, self.estimate, False, self.checkpoint.sha256)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for name, content in adapter_files(self.update_T_Ld, llm, text, llm.public_name).items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return packed.getvalue()


def media_type(accept: str | None) -> MediaType:
    """What an `Accept` header asks for; a zipped adapter where it does not care.

    Raises:
        ProblemError: 406, neither of the two.
    """
    ranges = [one.partition(";")[0].strip().lower() for one in (accept or "*/*").split(",")]
    if any(one in (ZIP, "*/*", "application/*", "") for one in ranges):
        return UPDATE_FILE if ranges[0] == UPDATE_FILE else ZIP
    if UPDATE_FILE in ranges:
        return UPDATE_FILE
    raise ProblemError(406, f"answers are {ZIP} (a PEFT folder) or {UPDATE_FILE} (an update file), not {accept}")
