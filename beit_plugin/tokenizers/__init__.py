"""Visual tokenizers: the dVAE of DALL-E for BEiT v1, VQ-KD for BEiT v2, and training of one's own VQ-KD."""

from .base import Tokenizer
from .dalle import DalleDecoder, DalleEncoder, DalleTokenizer
from .loading import PUBLISHED, load_tokenizer, save_tokenizer
from .teacher import Teacher
from .vqkd import VQKD, VQKDOutput, create_vqkd

__all__ = [
    'PUBLISHED',
    'VQKD',
    'DalleDecoder',
    'DalleEncoder',
    'DalleTokenizer',
    'Teacher',
    'Tokenizer',
    'VQKDOutput',
    'create_vqkd',
    'load_tokenizer',
    'save_tokenizer',
]
