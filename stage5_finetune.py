"""Stage 5: iterative deliberation finetuning (section 4.5).

    python stage5_finetune.py --model runs/x/iter0/model --data runs/x/iter1/deliberations.jsonl --out runs/x/iter1/model

Continues from the last iteration's policy on D_delib with the loss of equation 7, which is that of stage 0: the
trajectories mix steps that deliberate with steps that do not, so the policy also learns when to deliberate. 3 epochs in
the first iteration, 1 in later ones (section 5.3). Writes a plain checkpoint folder with the losses in training.json.
"""

from __future__ import annotations

import argparse

from common import add_training_options, finetune, run_stage


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_training_options(parser, epochs=3)
    return parser.parse_args()


if __name__ == "__main__":
    run_stage(lambda: finetune(parse_arguments()))
