"""DialogSum: spoken dialogues between #Person1# and #Person2# to summarise (Figure 14)."""

from gt_ray.tasks.summaries import DialogueSummary


class DialogSum(DialogueSummary):
    name = "dialogsum"
    hub = ("knkarthick/dialogsum",)
