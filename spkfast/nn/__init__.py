"""Modules: parameters and state-dict names; the arithmetic lies in the ops."""

from spkfast.nn import poolings, projectors
from spkfast.nn.cuda_graphs import CudaGraphs
from spkfast.nn.fbank import Fbank
from spkfast.nn.inference import calibrate, input_ranges, set_input_ranges, set_precision
from spkfast.nn.margin_softmax import MarginSoftmaxLoss, mean_embeddings
from spkfast.nn.pooling import AttentiveStatsPool
from spkfast.nn.se_res2net import SERes2NetBlock, TdnnLayer
from spkfast.nn.sharded_margin_softmax import ShardedMarginSoftmaxLoss
from spkfast.nn.spec_augment import SpecAugment
from spkfast.nn.sync_batch_norm import SyncBatchNorm

__all__ = [
    "AttentiveStatsPool",
    "CudaGraphs",
    "Fbank",
    "MarginSoftmaxLoss",
    "SERes2NetBlock",
    "ShardedMarginSoftmaxLoss",
    "SpecAugment",
    "SyncBatchNorm",
    "TdnnLayer",
    "calibrate",
    "input_ranges",
    "mean_embeddings",
    "poolings",
    "projectors",
    "set_input_ranges",
    "set_precision",
]
