"""Whether an architecture answers text with text, judged by its config alone."""

from __future__ import annotations

from typing import Any

from cl_runner.errors import UserError

_USE = "use an encoder-decoder (T5, BART …) or a decoder-only model (LLaMA, Qwen, GPT-2 …)"
# A checkpoint that was saved for something else lacks the language-model head, or holds half of the model.
_OTHER_HEADS = {
    "EncoderModel": "only the encoder",
    "ForMaskedLM": "a head that fills in masked words",
    "ForSequenceClassification": "a classification head",
    "ForTokenClassification": "a token-classification head",
    "ForQuestionAnswering": "a question-answering head",
    "ForMultipleChoice": "a multiple-choice head",
}


def is_encoder_decoder(config: dict[str, Any], where: str, trust_remote_code: bool = False) -> bool:
    """True for an encoder-decoder, False for a decoder-only model; anything else raises UserError, with why.

    ``config`` is config.json as read. Imports transformers (and with it torch), but loads no weights.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(f"model {where}: config.json names no model_type, so it is not a transformers model")
    if "quantization_config" in config:
        raise UserError(f"model {where}: its weights are quantized; give the unquantized model")
    if "auto_map" in config and trust_remote_code:
        return bool(config.get("is_encoder_decoder", False))

    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    if model_type not in configuration_auto.CONFIG_MAPPING:
        code = "; it brings its own code: model.trust_remote_code runs that, if you trust it"
        raise UserError(
            f"model {where}: model_type '{model_type}' is not known to transformers {transformers.__version__}"
            + (code if "auto_map" in config else "; a newer transformers may know it")
        )
    declared = config.get("architectures")
    architecture = str(declared[0]) if isinstance(declared, list) and declared else ""
    named = f"{model_type}, {architecture}" if architecture else model_type
    text_to_text = model_type in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    masked = model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if masked and not text_to_text and not config.get("is_decoder"):
        raise UserError(f"model {where} ({named}): is encoder-only: it reads text but cannot write an answer; {_USE}")
    for ending, what in _OTHER_HEADS.items():
        if architecture.endswith(ending):
            raise UserError(f"model {where} ({named}): was saved with {what}, not to write text; {_USE}")
    try:
        parsed = configuration_auto.CONFIG_MAPPING[model_type].from_dict(config)
    except Exception as error:  # the config classes validate, each in its own way
        why = " ".join(str(error).split())
        raise UserError(f"model {where}: config.json does not fit model_type '{model_type}' ({why})") from error
    if parsed.is_encoder_decoder:
        if text_to_text:
            return True
        raise UserError(f"model {where} ({named}): does not answer text with text; {_USE}")
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    raise UserError(f"model {where} ({named}): has no language-model head to write an answer with; {_USE}")
