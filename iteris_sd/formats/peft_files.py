"""What PEFT calls the files and folders of an adapter; known without torch, for whoever looks for them."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"  # the weights as older versions saved them
COMPONENTS = ("unet", "text_encoder")  # the folders of an adapter of several
