"""Train the Grad-Transformer on curated tuples.

python jobs/train.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/train.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("train")
