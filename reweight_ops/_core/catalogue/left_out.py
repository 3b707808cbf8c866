"""Published methods without an entry of their own, each with the reason."""

LEFT_OUT = {
    "AdaWAC": "it keeps weights of a supervised and a consistency loss for every sample; in one "
    "step they are the `token_weights` of two calls",
    "Aioli, Data Mixing Agent": "domain weights come from a fitted law or an agent, outside of "
    "the loss; pass them to `sample_weights.source_weights`",
    "Bradley-Terry (BT) losses of reward models: MADPO's step one, the Advantage Model, "
    "WorldPM, DMoERM": (
        "they are on scalar rewards, without a log-prob of a token; "
        "`-logsigmoid(r_w - r_l - margin)` is one line of PyTorch"
    ),
    "Cooldown": "the temperature falls during training: pass a smaller one to "
    "`sample_weights.upweight`; the paper's curve was not found",
    "Coreset reweighting, GSR, RENT, DWS": "weights come from gradients or the influence of whole "
    "samples, outside of the loss; pass them as `token_weights`",
    "Ctrl-U, WARM": "they use the uncertainty of generated images, and reward models averaged "
    "in weight space: only the rewards change",
    "Data augmentation by question-answer inversion": "part of TW-GRPO; it changes the data "
    "set, and the loss is `weights.tw_grpo`",
    "Difficulty bands, all-correct groups": "filters of prompts by their share of correct "
    "responses: `sample_weights.dynamic_sampling(low=, high=)`",
    "DrivingWorld": "the released code only masks tokens, as `completion_mask` does; it does "
    "not contain the reweighting of the abstract",
    "EDGE-GRPO: guided error correction": "the sampler replaces wrong responses before the "
    "loss; `advantages.edge_grpo` is the rest",
    "Even your Teacher Needs Guidance (self-distillation)": "its closed-form weight is for kernel "
    "ridge regression; the mixture that it analyses is `divergences.kd`",
    "GA + KL (unlearning)": "two calls: `methods.gradient_ascent` on what to forget, "
    "`distillation_loss` to the original model on what to retain",
    "How2Everything, MM-R5": "they define rewards of a task; the loss is unchanged GRPO",
    "Infra, RICL, LARICL": "they weight data by flipped difficulty, and examples in the context: "
    "neither is a loss on log-probs; pass the first as `token_weights`",
    "KaLM-Embedding-V2 (focal weights)": "it weights a contrastive loss between embeddings; no "
    "token is predicted",
    "LongAlign": "two components of a preference reward's gradient for diffusion models",
    "Lp-Reg, CaSP, DVP, VCPO, SofT-GRPO": "named where trainers' methods were listed; no "
    "trainer that was read has them, and no formula of theirs was",
    "OneRec IPA": "standard DPO on the best and worst of a beam: `pair_loss` `dpo`",
    "PRESENCE (self-influence)": "weights come from per-sample gradient norms, which a loss on "
    "logits cannot see; pass them as `token_weights`",
    "REC (ring, one-side and two-side masks)": "Trinity's masks of REINFORCE by the ratio; "
    "`methods.glm5` and `methods.topr` are of that family",
    "Regret-loss": "it is on action distributions over many rounds of a game, unsupervised; no "
    "formula on tokens was found",
    "RewardFusion, ConvexDA": "they combine reward models in training or in weight space; fixed "
    "combinations are `rewards.weighted_mean` and its neighbours",
    "SALSA (soup reference)": "only the reference model changes (the average of two models' "
    "parameters); any loss with a KL penalty fits",
    "SDPO, SDFT, GOLD, OPSD": "teachers of on-policy distillation; the loss of sampled tokens "
    "is `methods.opd`, of whole distributions `distillation_loss`",
    "SFT or CL for multimodal reranking": "a comparison of two trainings; no formula of a "
    "weight on log-probs was found",
    "ShrinkMatch, WEAT": "they are on class subsets in consistency training, and on adversarial "
    "training of vision models by energy",
    "stable_reinforce": "the default of Tinker's asynchronous recipes; its formula is not public",
    "Steps outside of a loss: PVPO's pre-sampling, SPO's and MCTS's sampling, TRAAC's "
    "compression, VC-PPO's value pre-training, the gradient-free search of constrained RLHF, "
    "bilevel updates of ScaleBiO and DreamPRM, ⊥Grad": (
        "they sample, search, compress, or update other parameters; these papers' entries are "
        "the rest"
    ),
    "Straight-through KL, IS-weighted with a cap; on-policy KL gradient (arXiv:2506.09477)": (
        "penalties of any loss and no method: the rules of `reweight_ops.rules.on_policy_kl`, "
        "and `K1Unbiased` to `K3Unbiased` of `reweight_ops.rules.penalties`"
    ),
    "TGeo-KD, KD-AIF, STORM": "weights come from a network or from influence functions, outside "
    "of the loss; pass them as `token_weights`",
}
