"""SAMSum: messenger dialogues to summarise (Figure 13)."""

from gt_ray.tasks.summaries import DialogueSummary


class SAMSum(DialogueSummary):
    name = "samsum"
    hub = ("knkarthick/samsum",)
