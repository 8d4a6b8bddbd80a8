"""LightningModules: federated rounds and the pretraining of a codec; small networks to start with."""

from fedlight.modules.federated import FederatedModule
from fedlight.modules.networks import MLP, BenchmarkCNN, LeNet5, SmallCNN
from fedlight.modules.pretraining import CodecPretrainingModule
from fedlight.modules.recurrent import CharLSTM
from fedlight.modules.resnet import ResNet18

__all__ = ["MLP", "BenchmarkCNN", "CharLSTM", "CodecPretrainingModule", "FederatedModule", "LeNet5", "ResNet18", "SmallCNN"]
