import logging

# When peft imports it, it warns of a missing kernel that quantized models alone would use.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
