"""Score all systems and write the report.

python jobs/evaluate.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/evaluate.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("evaluate")
