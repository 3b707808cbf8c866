"""Titles of papers with more than one entry, by arXiv id: each written once."""

TITLES = {
    "1503.02531": "Distilling the Knowledge in a Neural Network",
    "1904.12848": "Unsupervised Data Augmentation for Consistency Training",
    "1906.07413": "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    "2112.14869": "Label Distributionally Robust Losses for Multi-class Classification: "
    "Consistency, Robustness and Adaptivity",
    "2304.07288": "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    "2306.13085": "Harnessing Mixed Offline Reinforcement Learning Datasets via Trajectory "
    "Weighting",
    "2310.02743": "Reward Model Ensembles Help Mitigate Overoptimization",
    "2402.03300": "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language "
    "Models",
    "2405.19534": "Preference Learning Algorithms Do Not Learn Preference Rankings",
    "2406.03363": "LLM-based Rewriting of Inappropriate Argumentation using Reinforcement "
    "Learning from Machine Feedback",
    "2410.17509": "WAGLE: Strategic Weight Attribution for Effective and Modular Unlearning in "
    "Large Language Models",
    "2501.03262": "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global "
    "Advantage Normalization",
    "2502.06733": "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model "
    "Pretraining",
    "2503.14476": "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "2503.20783": "Understanding R1-Zero-Like Training: A Critical Perspective",
    "2504.02546": "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
    "2504.09696": "GRPO-LEAD: A Difficulty-Aware Reinforcement Learning Approach for Concise "
    "Mathematical Reasoning in Language Models",
    "2505.12929": "Do Not Let Low-Probability Tokens Over-Dominate in RL for LLMs",
    "2505.20686": "Accelerating RL for LLM Reasoning with Optimal Advantage Regression",
    "2505.22617": "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
    "2505.23564": "Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL "
    "for Large Language Models",
    "2505.24718": "Reinforcing Video Reasoning with Focused Thinking",
    "2507.18071": "Group Sequence Policy Optimization",
    "2509.11452": "Learning to Optimize Multi-Objective Alignment Through Dynamic Reward Weighting",
    "2509.16591": "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every "
    "Token's Nature",
    "2509.18851": "NGRPO: Negative-enhanced Group Relative Policy Optimization",
    "2509.22115": "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for "
    "Efficient Policy Optimization",
    "2509.23962": "Conditional Advantage Estimation for Reinforcement Learning in Large "
    "Reasoning Models",
    "2510.01161": "Prosperity before Collapse: How Far Can Off-Policy RL Reach with Stale Data "
    "on LLMs?",
    "2602.04879": "Rethinking the Trust Region in LLM Reinforcement Learning",
    "2602.07078": "The Optimal Token Baseline: Variance Reduction for Long-Horizon LLM-RL",
    "2603.19835": "FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
}
