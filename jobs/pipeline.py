"""The main job: all stages, then the table.

python jobs/pipeline.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/pipeline.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("pipeline")
