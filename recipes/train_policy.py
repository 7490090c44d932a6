"""The train stage under a launcher: `accelerate launch recipes/train_policy.py experiment.yaml --objective empathy`.

The same as `emorl train`, for several processes: every one runs this file. On CPU two processes need
`torchrun --nproc_per_node 2 recipes/train_policy.py …`; `accelerate launch --cpu --num_processes 2` starts one.
"""

import sys

from emorl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
