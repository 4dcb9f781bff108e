"""Fine-tune both models of a pair on every shadow.

python jobs/curate.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/curate.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("curate")
