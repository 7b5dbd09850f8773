//! Vector code against the rule of one element.

use super::*;

#[test]
fn every_path_stores_the_same_levels() {
    let mut stream = crate::rng::Stream::new(5, 0);
    let odd = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-44, f32::MAX, 0.5, 1.5, -2.5, 126.5, -127.5];
    let x: Vec<f32> = (0..83).map(|_| 90.0 * stream.normal() as f32).chain(odd).collect();
    for (zero, low, high, shift) in [(0.0, -127.0, 127.0, 0.0), (131.0, 0.0, 255.0, 128.0), (0.0, -7.0, 7.0, 0.0)] {
        for inverse in [1.0, 0.37, 0.0, 1e36] {
            let grid = Grid { scale: 1.0, inverse, zero, low, high };
            let want: Vec<i8> = x.iter().map(|x| store_level(*x, &grid, shift)).collect();
            let mut have = vec![99; x.len()];
            store_row(&x, &mut have, &grid, shift);
            assert_eq!(want, have, "zero {zero}, inverse {inverse}");
            have.fill(99);
            store_row_by_element(&x, &mut have, &grid, shift);
            assert_eq!(want, have);
        }
    }
    // Rows that are their own groups, whose last part fills no register.
    let scheme = Scheme { mode: 0, low: -127.0, high: 127.0, unit: 0.0 };
    let rows: Vec<f32> = (0..3 * 37).map(|_| stream.normal() as f32).collect();
    let [mut want, mut have] = [vec![99; rows.len()], vec![98; rows.len()]];
    let [mut scales, mut own] = [[0.0; 3]; 2];
    store_rows_by_element(&rows, &mut want, &mut scales, &scheme, 0.0);
    store_rows(&rows, &mut have, &mut own, &scheme, 0.0);
    assert_eq!((want, scales), (have, own));
}
