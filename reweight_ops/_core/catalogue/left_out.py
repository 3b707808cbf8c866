"""Published methods without an entry of their own, each with the reason."""

LEFT_OUT = {
    "Clip-Cov": "drops a random choice of the tokens whose covariance is between two bounds, and a spec draws no numbers: pass the choice as `token_weights`",
    "DrivingWorld": "the released code only masks tokens, which `completion_mask` does; the reweighting of its abstract was not found in it",
    "How2Everything, MM-R5": "rewards of a task; the loss is unchanged GRPO",
    "OneRec IPA": "standard DPO on the best and worst of a beam: `pair_loss` `dpo`",
    "PRESENCE (self-influence)": "weights from per-sample gradient norms, which no loss on logits can see; pass them as `token_weights`",
    "SALSA (soup reference)": "only the reference model changes (the average of two models' parameters); the loss is any with a KL penalty",
    "SFT or CL for multimodal reranking": "a comparison of two trainings; no formula of a weight on log-probs was found",
    "TGeo-KD, KD-AIF, STORM": "weights from a network or from influence functions, trained outside of the loss; pass them as `token_weights`",
}
