"""Self1E: a multimodal LLM that segments by itself. The Auto classes of transformers know it once this is imported."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from self1e.model.config import Self1EConfig
from self1e.model.modeling import Self1EForSegmentation
from self1e.model.processor import Self1EProcessor

AutoConfig.register("self1e", Self1EConfig)
AutoModel.register(Self1EConfig, Self1EForSegmentation)
AutoModelForImageTextToText.register(Self1EConfig, Self1EForSegmentation)
AutoProcessor.register(Self1EConfig, Self1EProcessor)

__all__ = ["Self1EConfig", "Self1EForSegmentation", "Self1EProcessor"]
