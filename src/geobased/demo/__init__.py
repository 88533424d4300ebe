"""Web pages made with Gradio, an extra: `pip install "geobased[demo]"`. They run here and ask nothing of other machines."""

import os

# read when gradio is imported, which the modules beside this one do
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
