"""Which KV heads of a model retrieve: how they are found, and the file that names them.

Needs torch and transformers, never vLLM, so heads can be found without an engine.

    profile     razor_profile.json: what it holds, where it is looked for
    calibrate   scores from a probe that transformers runs, and the choice
    alibi       a bound on how far the heads of an ALiBi model can see, from its weights
    convert     published patterns into profiles, and profiles into DuoAttention's format
"""
