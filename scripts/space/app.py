# Copyright 2026 The spectrafm_hf authors. Licensed under the Apache License, Version 2.0.
"""What a Gradio Space of the Hugging Face hub runs: `spectrafm app`, for everyone, at the port that Spaces expect.

For a checkpoint of your own, `launch("OWNER/NAME", ...)`.
"""

import os

from spectrafm_hf.show.app import launch


if __name__ == "__main__":
    launch(host="0.0.0.0", port=int(os.environ.get("GRADIO_SERVER_PORT", "7860")))
