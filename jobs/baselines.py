"""Make the baselines of appendix C.2 that read private data: w2s, conf, vissup.

python jobs/baselines.py --preset embedded 'evaluation.baselines=[w2s, conf, vissup]'
ray job submit --working-dir . -- python jobs/baselines.py --preset embedded 'evaluation.baselines=[w2s, conf, vissup]'
"""

from gt_ray.cli import job

if __name__ == "__main__":
    job("baselines")
