//! A list of allowed calls as a program of classic BPF.
//!
//! The kernel runs a new filter once for every system call that there is, to remember those that
//! it need not ask about again. A program that looks for a call from the beginning of its list
//! makes that a quarter of a millisecond, which is a quarter of what the start of a VM takes; so
//! this one looks for it by halves. Source: Linux Documentation/networking/filter.rst.

use seccompiler::sock_filter;

/// Offsets in `struct seccomp_data`. Of an argument, the lower half.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Operations.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// What an argument of a call has to be: one of some values, in these bits.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) argument: u8,
    pub(super) mask: u32,
    pub(super) values: Vec<u32>,
}

/// A system call that is allowed, always or on a condition.
pub(super) type Allowed = (u32, Option<Condition>);

/// The program that allows these calls, which are in the order of their numbers, and has all
/// others fail with EPERM.
pub(super) fn compile(calls: &[Allowed]) -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCH),
        // Calls by the interfaces for 32-bit programs have other numbers.
        jump(IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        refuse(),
        load(NUMBER),
    ];
    program.extend(search(calls));
    program
}

/// Looks for the number. Every way through it ends in a return.
fn search(calls: &[Allowed]) -> Vec<sock_filter> {
    match calls {
        // A few are asked one after the other: each goes to the last line.
        few @ ([] | [_] | [_, _] | [_, _, _] | [_, _, _, _])
            if few.iter().all(|(_, condition)| condition.is_none()) =>
        {
            let left = (1..=few.len() as u8).rev();
            let asked =
                few.iter().zip(left).map(|((number, _), left)| jump(IF_EQUAL, *number, left, 0));
            asked.chain([refuse(), allow()]).collect()
        }
        [(number, Some(condition))] => {
            let check = check(condition);
            let mut program = vec![jump(IF_EQUAL, *number, 1, 0), refuse()];
            program.extend(check);
            program
        }
        _ => {
            let (low, high) = calls.split_at(calls.len() / 2);
            let first = high.first().map_or(0, |call| call.0);
            let (low, high) = (search(low), search(high));
            let mut program = far_jump_at_least(first, low.len());
            program.extend(low);
            program.extend(high);
            program
        }
    }
}

/// Looks at an argument.
fn check(condition: &Condition) -> Vec<sock_filter> {
    let mut program = vec![
        load(ARGUMENTS + 8 * u32::from(condition.argument)),
        sock_filter { code: AND, jt: 0, jf: 0, k: condition.mask },
    ];
    for value in &condition.values {
        program.extend([jump(IF_EQUAL, *value, 0, 1), allow()]);
    }
    program.push(refuse());
    program
}

/// Goes on behind `distance` operations where the number is at least `number`. A condition jumps
/// over 255 operations at most, an unconditional jump over any number.
fn far_jump_at_least(number: u32, distance: usize) -> Vec<sock_filter> {
    match u8::try_from(distance) {
        Ok(near) => vec![jump(IF_AT_LEAST, number, near, 0)],
        Err(_) => {
            let always = (libc::BPF_JMP | libc::BPF_JA) as u16;
            let far = sock_filter { code: always, jt: 0, jf: 0, k: distance as u32 };
            vec![jump(IF_AT_LEAST, number, 0, 1), far]
        }
    }
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn allow() -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }
}

fn refuse() -> sock_filter {
    let k = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    sock_filter { code: RETURN, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program says of a call, and after how many operations.
    fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u32; 6]) -> (bool, usize) {
        let (mut at, mut value, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            (at, steps) = (at + 1, steps + 1);
            match code {
                LOAD if k == NUMBER => value = number,
                LOAD if k == ARCH => value = arch,
                LOAD => value = arguments[(k - ARGUMENTS) as usize / 8],
                AND => value &= k,
                IF_EQUAL => at += usize::from(if value == k { jt } else { jf }),
                IF_AT_LEAST => at += usize::from(if value >= k { jt } else { jf }),
                RETURN => return (k == libc::SECCOMP_RET_ALLOW, steps),
                _ => at += k as usize,
            }
        }
    }

    #[test]
    fn each_number_is_found_and_no_other_in_a_few_steps() {
        for count in [0, 1, 2, 3, 7, 80, 400] {
            let calls: Vec<Allowed> = (0..count).map(|at| (at * 3 + 1, None)).collect();
            let program = compile(&calls);
            for number in 0..count * 3 + 5 {
                let (allowed, steps) = run(&program, AUDIT_ARCH_X86_64, number, [0; 6]);
                assert_eq!(allowed, number % 3 == 1 && number < count * 3, "{number} of {count}");
                assert!(steps <= 25);
                assert!(!run(&program, 0x4000_0003, number, [0; 6]).0, "a 32-bit call");
            }
            assert!(!run(&program, AUDIT_ARCH_X86_64, u32::MAX, [0; 6]).0);
        }
    }

    #[test]
    fn an_argument_is_one_of_the_values_in_its_mask() {
        let condition = |argument, mask, values: &[u32]| {
            Some(Condition { argument, mask, values: values.to_vec() })
        };
        let program = compile(&[
            (9, condition(2, 4, &[0])),
            (16, condition(1, u32::MAX, &[0xae80, 7])),
            (17, None),
        ]);
        let allowed = |number, argument: usize, value| {
            let mut arguments = [0xffff_ffff; 6];
            arguments[argument] = value;
            run(&program, AUDIT_ARCH_X86_64, number, arguments).0
        };
        assert!(allowed(9, 2, 0xffff_fffb) && allowed(9, 2, 0) && !allowed(9, 2, 7));
        assert!(allowed(16, 1, 0xae80) && allowed(16, 1, 7) && !allowed(16, 1, 8));
        assert!(!allowed(16, 0, 7) && allowed(17, 0, 7) && !allowed(18, 0, 0));
    }
}
