// SPDX-License-Identifier: Apache-2.0
//! The same as check.c, in Rust.
#[allow(dead_code)]
mod refmoe_pack;

use refmoe_pack::Case;
use std::{env, fs, io, process};

fn words(path: &str) -> Vec<[u8; 4]> {
    fs::read(path).unwrap().chunks_exact(4).map(|word| word.try_into().unwrap()).collect()
}

fn integers(path: &str) -> Vec<i32> {
    words(path).into_iter().map(i32::from_le_bytes).collect()
}

fn main() {
    let case = Case::open(&env::args().nth(1).unwrap()).unwrap_or_else(|what| {
        println!("{what}");
        process::exit(2)
    });
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let [run, tap, dtype, values, experts] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let ids = if experts == "-" { None } else { Some(integers(experts)) };
        let r = if tap.contains("router.experts") {
            case.compare_experts(run, tap, dtype, &integers(values))
        } else {
            let values: Vec<f32> = words(values).into_iter().map(f32::from_le_bytes).collect();
            case.compare(run, tap, dtype, &values, ids.as_deref())
        };
        let status = format!("{:?}", r.status).to_lowercase();
        println!("{status} {} {} {} {:e} {:e} {:e}", r.judged, r.outside, r.index, r.found, r.low, r.high);
    }
}
