import hydra
from pgsuite.runtime import schema
from omegaconf import OmegaConf
schema.register()
@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg):
    print(OmegaConf.to_yaml(cfg))
main()
