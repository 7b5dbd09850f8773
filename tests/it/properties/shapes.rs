//! Structures that go: shapes follow, and what is left computes what it did.

use espalier::compress::freeze::{Form, freeze};
use espalier::compress::structure::importance::rotary_pairs;
use espalier::compress::structure::{self, Keep, Target, largest, scaled_ffn, without_block};
use espalier::nn::config::Size;
use espalier::nn::{Config, Model, Pass, Positions};
use espalier::recipe::corpus::upload;
use espalier::tensor::Tensor;

use super::{Draw, holds};
use crate::model::{VOCABULARY, assemble, examples};

fn model(draw: &mut Draw) -> Model {
    let size = Size {
        layers: draw.size(3),
        heads: draw.size(2),
        head_size: 4 * draw.size(3),
        ffn_width: 16 * draw.size(3),
        max_positions: 32,
    };
    let config = if draw.below(2) == 0 { Config::glm(size, VOCABULARY) } else { Config::gpt(size, VOCABULARY) };
    Model::init(config, &draw.device, u64::from(draw.stream.word())).unwrap()
}

fn hidden(model: &Model) -> Vec<f64> {
    let batch = upload(model.device(), &assemble(&examples(2, 7))).unwrap();
    Pass::inference(model).hidden(&batch).unwrap().tensor.to_f64().unwrap()
}

fn close(want: &[f64], have: &[f64]) {
    let scale = want.iter().fold(1e-30f64, |most, y| most.max(y.abs()));
    assert!(want.len() == have.len() && want.iter().zip(have).all(|(a, b)| (a - b).abs() <= 1e-4 * scale));
}

#[test]
fn exactly_so_many_are_largest_and_none_that_goes_is_larger() {
    holds("largest", |draw| {
        let count = draw.size(30);
        let scores: Vec<f64> = draw.values(count).into_iter().map(f64::from).collect();
        let n = draw.below(count + 1);
        let kept = largest(&scores, n);
        assert!(kept.len() == n && kept.windows(2).all(|pair| pair[0] < pair[1]));
        for gone in (0..count).filter(|i| !kept.contains(i)) {
            assert!(kept.iter().all(|&k| scores[k] > scores[gone] || (scores[k] == scores[gone] && k < gone)));
        }
    });
}

#[test]
fn a_pruned_model_has_the_shapes_that_its_config_says() {
    holds("pruned shapes", |draw| {
        let teacher = model(draw);
        let layers = draw.size(teacher.config.blocks.len());
        let head_size = 4 * draw.size(teacher.config.blocks[0].head_size / 4);
        let keep = structure::at_random(&teacher.config, Target::scaled(layers, head_size), 3).unwrap();
        let pruned = structure::prune(&teacher, &keep).unwrap();
        let config = &pruned.config;
        config.check(std::path::Path::new("pruned")).unwrap();
        config.check_tensors(std::path::Path::new("pruned"), &pruned.tensors).unwrap();
        let block = &teacher.config.blocks[0];
        let ffn = scaled_ffn(block.ffn_width, block.head_size, head_size).min(block.ffn_width);
        assert_eq!((config.blocks.len(), config.width), (layers, block.heads * head_size));
        assert!(config.blocks.iter().all(|b| (b.head_size, b.ffn_width) == (head_size, ffn)));
        let counted: usize = config.parameters().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
        assert_eq!(pruned.parameter_count(), counted);
        assert!(hidden(&pruned).iter().all(|x| x.is_finite()));
    });
}

#[test]
fn keeping_everything_changes_no_bit() {
    holds("nothing pruned", |draw| {
        let teacher = model(draw);
        let same = structure::prune(&teacher, &Keep::all(&teacher.config)).unwrap();
        assert_eq!(same.config, teacher.config);
        assert_eq!(hidden(&same), hidden(&teacher));
    });
}

#[test]
fn removed_neurons_are_zeroed_ones() {
    holds("removed neurons", |draw| {
        let teacher = model(draw);
        let mut keep = Keep::all(&teacher.config);
        let mut zeroed = teacher.duplicate().unwrap();
        for (i, block) in keep.blocks.iter_mut().enumerate() {
            let neurons = block.neurons.as_mut().unwrap();
            let n = neurons.len();
            let left = draw.size(n);
            draw.stream.shuffle(neurons);
            neurons.truncate(left);
            neurons.sort_unstable();
            let name = format!("blocks.{i}.ffn.out.weight");
            let mut values = teacher.values(&name).unwrap();
            values.iter_mut().enumerate().filter(|(j, _)| !neurons.contains(&(j % n))).for_each(|(_, w)| *w = 0.0);
            let dims = teacher.get(&name).unwrap().dims().to_vec();
            zeroed.tensors.insert(name, Tensor::from_slice(&draw.device, &dims, &values).unwrap());
        }
        close(&hidden(&zeroed), &hidden(&structure::prune(&teacher, &keep).unwrap()));
    });
}

#[test]
fn a_model_without_a_block_has_the_others() {
    holds("without a block", |draw| {
        let teacher = model(draw);
        let blocks = teacher.config.blocks.len();
        if blocks == 1 {
            return;
        }
        let gone = draw.below(blocks);
        let rest = without_block(&teacher, gone).unwrap();
        let others: Vec<usize> = (0..blocks).filter(|i| *i != gone).collect();
        for (place, old) in others.iter().enumerate() {
            for part in ["attention.query.weight", "ffn.out.weight", "norm_ffn.weight"] {
                let [a, b] =
                    [(&rest, place), (&teacher, *old)].map(|(m, i)| m.values(&format!("blocks.{i}.{part}")).unwrap());
                assert_eq!(a, b);
            }
        }
    });
}

#[test]
fn rotary_pairs_stay_together_with_their_frequency() {
    holds("rotary pairs", |draw| {
        let teacher = model(draw);
        let block = &teacher.config.blocks[0];
        let head_size = 4 * draw.size(block.head_size / 4);
        let keep = structure::at_random(&teacher.config, Target::scaled(1, head_size), 5).unwrap();
        let [old, new] = [block.head_size, head_size].map(|n| rotary_pairs(teacher.config.positions, n));
        for head in keep.blocks[0].attention.as_ref().unwrap().query_key.chunks(head_size) {
            for (pair, frequency) in new.iter().zip(&keep.blocks[0].inverse_frequencies) {
                let was = (head[pair.0] % block.head_size, head[pair.1] % block.head_size);
                let place = old.iter().position(|p| *p == was).expect("a whole pair");
                assert_eq!(block.inverse_frequencies[place], *frequency);
            }
        }
        assert!(matches!(teacher.config.positions, Positions::Rotary | Positions::Rotary2d));
    });
}

#[test]
fn deployed_forms_are_smaller_by_their_formula() {
    holds("bytes of deployed forms", |draw| {
        let teacher = model(draw);
        let linears = teacher.config.all_linears();
        let dims = |name: &String| -> [usize; 2] {
            teacher.get(&format!("{name}.weight")).unwrap().dims().try_into().unwrap()
        };
        let dense: usize = linears.iter().map(dims).map(|[n, k]| 4 * n * k).sum();
        let int8: usize = linears.iter().map(dims).map(|[n, k]| n * k + 4 * n).sum();
        let frozen = freeze(&teacher, Form { sparse: false, quantized: Some(Default::default()) }).unwrap();
        assert_eq!(teacher.total_bytes() - frozen.total_bytes(), dense - int8);
        assert_eq!(freeze(&teacher, Form::default()).unwrap().total_bytes(), teacher.total_bytes());
        frozen.config.check_tensors(std::path::Path::new("frozen"), &frozen.tensors).unwrap();
    });
}
