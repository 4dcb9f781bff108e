"""Generate LLM adapters from client updates.

python jobs/generate.py --preset embedded [key=value ...]
ray job submit --working-dir . -- python jobs/generate.py --preset embedded
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("generate")
