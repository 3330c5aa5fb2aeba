"""Rows that are known not to be green, and why. A row here that is green fails the test: it must go."""

MADE_ANEW = (
    "weight_norm makes its weight anew at every forward, a float32 tensor of the weight's size, as the unpatched model "
    "does; torch.nn.utils.parametrize.remove_parametrizations before the patch folds it"
)

CAUSES: dict[str, str] = {
    "weight_norm": MADE_ANEW,
    "weight_norm on Linear": MADE_ANEW,
    "wav2vec2 (Wav2Vec2Model)": MADE_ANEW,
    "hubert (HubertModel)": MADE_ANEW,
    "wavlm (WavLMModel)": MADE_ANEW,
    "unispeech (UniSpeechModel)": MADE_ANEW,
    "sew (SEWModel)": MADE_ANEW,
    "encodec (EncodecModel)": MADE_ANEW,
    "chameleon (ChameleonForConditionalGeneration), seeing": "its codebook is squared for every picture: a float32 "
    "tensor of its size, as in the unpatched model",
    "bit (BitModel)": "its convolutions standardise their weight at every forward: a float32 tensor of its size, as in "
    "the unpatched model",
}
"""Row -> cause."""
