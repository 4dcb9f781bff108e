"""Run the main job once per cell of a study.

python jobs/study.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/study.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("study")
