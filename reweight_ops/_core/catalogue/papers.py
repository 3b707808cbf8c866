"""Facts about a paper apart from its title: its year, and the repository of its
authors.
"""

from __future__ import annotations

from dataclasses import dataclass

from .registry import CATALOGUE, Entry

#: The authors' repositories on GitHub, by arXiv id. Entries were compared with these. A
#: port by others is not among them.
REPOSITORIES = {
    "2505.12929": "zhyang2226/AR-Lopti",
    "2504.09696": "aeroplanepaper/GRPO-LEAD",
    "2509.18849": "WenkeHuang/MAPO",
    "2509.25050": "scxue/advantage_weighted_matching",
    "2505.14264": "JianxXiong/AAPO",
    "2509.11452": "yining610/dynamic-reward-weighting",
    "2509.23962": "biuboomc/CANON",
    "2306.13085": "Improbable-AI/harness-offline-rl",
    "2509.18851": "nangongrui-ngr/NGRPO",
    "2510.10150": "zz-haooo/STEER",
    "2505.23564": "AIFrameResearch/SPO",
    "2509.16591": "starriver030515/HAPO",
    "2310.04373": "tedmoskovitz/ConstrainedRL4LMs",
    "2510.04474": "Optimization-AI/DRPO",
    "2310.10505": "liziniu/ReMax",
    "2507.21848": "ZhangXJ199/EDGE-GRPO",
    "2602.05630": "Red-RL/REAL",
    "2602.02710": "tajwarfahim/maxrl",
    "2502.06733": "sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025",
    "2510.05342": "sirano1004/Margin-Apative-Direct-Preference-Optimization",
    "2406.11827": "wzhouad/WPO",
    "2405.19534": "angie-chen55/pref-learning-ranking-acc",
    "2505.24718": "longmalongma/TW-GRPO",
    "2506.07527": "TheRoadQaQ/ReLIFT",
    "2505.17018": "kxfan2002/SophiaVL-R1",
    "2310.02743": "tlc4418/llm_optimization",
    "2304.06767": "RLHFlow/RAFT",
    "2310.16763": "openfeedback/superhf",
    "2406.03363": "timonziegenbein/inappropriateness-mitigation",
    "2410.05102": "huawei-noah/HEBO",
    "2601.04992": "Eureka-Maggie/GLOW",
    "2405.16436": "YSLIU627/Regularized-Preference-Optimization",
    "2411.08937": "penghui-yang/DHKD",
    "2112.14869": "Optimization-AI/ICML2023_LDR",
    "2405.00451": "YuxiXie/MCTS-DPO",
    "2410.12735": "Raibows/CREAM",
    "2410.17509": "OPTML-Group/WAGLE",
    "2308.09878": "towardsautonomy/DatasetEquity",
    "1904.12848": "google-research/uda",
    "2211.13081": "mariodoebler/test-time-adaptation",
    "2506.01347": "TianHongZXY/RLVR-Decomposed",
    "1906.07413": "kaidic/LDAM-DRW",
}

#: The years of publications that are not on arXiv, by title.
_YEARS = {
    "Simple statistical gradient-following algorithms for connectionist reinforcement "
    "learning": 1992,
    "FlashREINFORCE, as named in OpenRLHF 0.11.2": 2026,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training": 2025,
    "Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model": 2025,
    "When Speed Kills Stability: Demystifying RL Collapse from the Training-Inference "
    "Mismatch": 2025,
    "Doubly Robust Instance-Reweighted Adversarial Training": 2023,
    "On-Policy Distillation": 2025,
    "A note on DPO with noisy preferences & relationship to IPO": 2023,
}


@dataclass(frozen=True)
class Paper:
    """One publication.

    ``year`` is that of its first version, None if unknown. ``repository`` is that of
    its authors, empty if none was read.
    """

    title: str
    arxiv: str
    year: int | None
    repository: str

    @property
    def source(self) -> str:
        """Return title, year, arXiv id and code in one line, as far as
        they are known."""
        known = (
            self.title,
            str(self.year or ""),
            f"arXiv:{self.arxiv}" if self.arxiv != "unknown" else "",
            self.url,
        )
        return ", ".join(part for part in known if part)

    @property
    def url(self) -> str:
        """Of the repository."""
        return f"https://github.com/{self.repository}" if self.repository else ""


def paper_of(entry: Entry) -> Paper:
    """Return the paper of an entry. An arXiv id begins with the year."""
    year = 2000 + int(entry.arxiv[:2]) if entry.arxiv != "unknown" else _YEARS.get(entry.paper)
    return Paper(entry.paper, entry.arxiv, year, REPOSITORIES.get(entry.arxiv, ""))


def papers() -> dict[str, list[Entry]]:
    """Return every paper of the catalogue by title, with its entries."""
    found: dict[str, list[Entry]] = {}
    for of_kind in CATALOGUE.values():
        for entry in of_kind.values():
            found.setdefault(entry.paper, []).append(entry)
    return found
